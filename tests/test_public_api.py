"""The public face: what `import engine` offers, and that it costs nothing before it is used."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import engine

FACE = {
    "AccessDeniedError", "AlreadyExistsError", "BadDataError", "Base", "BytesMemory", "CachedFileInfo",
    "CachedFiles", "Connector", "Containers", "KernelConfig", "SystemFiles",
    "ConnectorClosedError", "ConnectorInfo", "EngineError", "ExportInfo", "Extent", "FaultError", "FaultKind",
    "Faults", "FileMemory", "HostOwned", "ImportInfo", "Instance", "InvalidArgumentError", "KernelLog", "LogRecord",
    "Machine", "MapRange", "MappedMemory", "Memory", "MemoryMap", "MemoryWindow", "Module", "ModuleInfo",
    "NotFoundError", "NotRecognisedError", "OpenFileInfo", "OpenFiles", "OsInfo", "OsLayer", "PageFlags",
    "PagedOutError", "PhysicalMap", "PhysicalMaps", "PluginError", "ProcFiles", "Process", "ProcessExitedError",
    "ProcessInfo", "ReadOnlyError", "ReadOnlyFaultError", "Region", "Rights", "SectionInfo", "SocketInfo",
    "Sockets", "SourceFaultError", "SymbolInfo", "Symbols", "Target", "TargetBusyError", "TargetGoneError",
    "TargetHints", "TargetTimeoutError", "ThreadInfo", "ThreadRegisters", "UnsupportedError", "UnusableTargetError",
    "VirtualMemory", "open_target",
}  # fmt: skip


def test_the_face_is_what_it_was():
    assert set(engine.__all__) == FACE


@pytest.mark.parametrize("name", sorted(FACE))
def test_every_public_name_loads_and_is_documented(name):
    value = getattr(engine, name)
    assert (inspect.getdoc(value) or "").strip()
    if inspect.isclass(value):
        for method, function in vars(value).items():
            if not method.startswith("_") and inspect.isfunction(function):
                assert (function.__doc__ or "").strip(), f"{name}.{method} has no docstring"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = engine.nonsense


def test_every_error_has_a_code_of_its_own():
    def all_classes(base):
        for kind in base.__subclasses__():
            if kind.__module__.startswith("engine"):
                yield kind
                yield from all_classes(kind)

    codes = [kind.code for kind in all_classes(engine.EngineError)]
    assert len(codes) == len(set(codes))
    assert all(code.replace("_", "").isalpha() for code in codes)


def test_importing_the_engine_imports_neither_numpy_nor_the_mount():
    code = "import sys, engine; print([m for m in ('numpy', 'pyfuse3', 'trio', 'psutil') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout.strip() == "[]"


def test_the_docstring_of_the_package_shows_what_works():
    import doctest

    assert doctest.testmod(engine, optionflags=doctest.ELLIPSIS).failed == 0
