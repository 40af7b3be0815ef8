"""The filter of system calls (seccomp) that the kernel puts on the processes of a sandbox.

Calls by number, as the kernel's headers have them; x86-64 and AArch64 have a filter, other processors none.
"""

import platform
import struct
from functools import cache

# What a program never needs and the kernel's limits do not cover: numbers on x86-64 and on AArch64.
FORBIDDEN = {
    "ptrace": (101, 117),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "pidfd_getfd": (438, 438),
    "mount_setattr": (442, 442),
}
# Column of FORBIDDEN, the kernel's id of the architecture, number of clone.
ARCHITECTURES = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}
CLONE3, NEW_USER = 435, 0x10000000
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # where these stand in what the kernel hands to a filter
LOAD, EQUAL, ABOVE, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, REFUSE, ABSENT = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026  # EPERM, ENOSYS


@cache
def system_call_filter() -> bytes:
    """The filter for this machine's processor, as the kernel takes it; empty where the numbers are not known."""
    if platform.machine() not in ARCHITECTURES:
        return b""
    column, architecture, clone = ARCHITECTURES[platform.machine()]
    # An instruction: what to do, how many to skip if a comparison holds, if it does not, and a number.
    rules = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    rules += [(ABOVE, 0, 1, 0x40000000), (RETURN, 0, 0, REFUSE)]  # x86-64's second set of numbers
    for numbers in FORBIDDEN.values():
        rules += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, REFUSE)]
    rules += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, ABSENT)]  # its flags are out of sight; the C library has clone
    rules += [(EQUAL, 0, 3, clone), (LOAD, 0, 0, FIRST_ARGUMENT), (ANY_BIT, 0, 1, NEW_USER), (RETURN, 0, 0, REFUSE)]
    rules += [(RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *rule) for rule in rules)
