"""A program with a secret in its memory, for the tour: prints where it lies, then waits until its input ends."""

import argparse
import ctypes
import sys

argparse.ArgumentParser(description=__doc__).parse_args()
# Where Yama lets only parents look into a process, this one lets everybody of its user (prctl(2), PR_SET_PTRACER).
ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)
# Put together here, so that the text of this program does not hold it.
secret = ctypes.create_string_buffer(("the-secret-" + "of-this-tour").encode() + b" lies here", 64)
print(ctypes.addressof(secret), flush=True)
sys.stdin.read()
