"""Records → JSON, tables, `info` texts and the formats of /proc: one place for the mount and the command line.

A record is a dict of JSON-able values under the keys that every OS layer gives: addresses are strings in
hexadecimal (a JSON number loses them), sizes and ids are numbers, times are ISO 8601 in UTC. What is not known
is None; a key is never missing.

Text comes from hostile memory. `escape_terminal` is for what people read, `file_name` for names in the tree;
bytes that are no UTF-8 arrive as surrogates (PEP 383), as Python gives them everywhere else.
"""

from __future__ import annotations

from cloudfs.render.escaping import escape_terminal as escape_terminal
from cloudfs.render.log import log_lines as log_lines
from cloudfs.render.log import log_record as log_record
from cloudfs.render.log import symbol_line as symbol_line
from cloudfs.render.log import symbol_record as symbol_record
from cloudfs.render.maps import maps_line as maps_line
from cloudfs.render.maps import maps_text as maps_text
from cloudfs.render.names import file_name as file_name
from cloudfs.render.names import unescape_file_name as unescape_file_name
from cloudfs.render.physical import ModuleNames as ModuleNames
from cloudfs.render.physical import page_permissions as page_permissions
from cloudfs.render.physical import page_size_text as page_size_text
from cloudfs.render.physical import physical_map_record as physical_map_record
from cloudfs.render.physical import physical_maps_lines as physical_maps_lines
from cloudfs.render.physical import translation_record as translation_record
from cloudfs.render.physical import untranslated_record as untranslated_record
from cloudfs.render.records import Record as Record
from cloudfs.render.records import connector_record as connector_record
from cloudfs.render.records import export_record as export_record
from cloudfs.render.records import import_record as import_record
from cloudfs.render.records import instance_record as instance_record
from cloudfs.render.records import module_record as module_record
from cloudfs.render.records import open_file_record as open_file_record
from cloudfs.render.records import os_record as os_record
from cloudfs.render.records import plugin_record as plugin_record
from cloudfs.render.records import process_count as process_count
from cloudfs.render.records import process_record as process_record
from cloudfs.render.records import region_record as region_record
from cloudfs.render.records import section_record as section_record
from cloudfs.render.records import socket_record as socket_record
from cloudfs.render.records import target_record as target_record
from cloudfs.render.records import thread_record as thread_record
from cloudfs.render.text import Column as Column
from cloudfs.render.text import cell_text as cell_text
from cloudfs.render.text import display_width as display_width
from cloudfs.render.text import info_text as info_text
from cloudfs.render.text import table as table
from cloudfs.render.text import to_json as to_json
from cloudfs.render.values import address_text as address_text
from cloudfs.render.values import human_size as human_size
from cloudfs.render.values import time_text as time_text
