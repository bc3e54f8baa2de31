"""Python code in a process where the kernel refuses one system call, as a container's seccomp profile would."""

import errno
import platform
import subprocess
import sys

import pytest

NUMBERS = {
    "x86_64": {"socket": 41, "process_vm_readv": 310, "memfd_create": 319, "pidfd_open": 434},
    "aarch64": {"socket": 198, "process_vm_readv": 270, "memfd_create": 279, "pidfd_open": 434},
}

# Loads the call's number, compares, returns errno or allows: linux/filter.h, linux/seccomp.h.
FORBID = """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
lines = [(0x20, 0, 0, 0), (0x15, 0, 1, {number}), (0x06, 0, 0, 0x50000 | {code}), (0x06, 0, 0, 0x7fff0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
filter = struct.pack("@HP", len(lines), ctypes.addressof(program))
assert libc.prctl(38, 1, 0, 0, 0) == 0, "no_new_privs"
if libc.prctl(22, 2, filter, 0, 0) != 0:
    raise SystemExit(77)
"""


def run_without(call, code, refusal=errno.EPERM):
    """Run `code` where `call` fails with `refusal`; return the finished process."""
    numbers = NUMBERS.get(platform.machine())
    if numbers is None:
        pytest.skip("the numbers of system calls are known for x86-64 and aarch64 only")
    script = FORBID.format(number=numbers[call], code=refusal) + code
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    if done.returncode == 77:
        pytest.skip("this kernel has no seccomp filters")
    return done
