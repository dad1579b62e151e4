"""Formats sizes in bytes for people, and parses them from compilers' messages."""

# XLA writes 1.5G for 1.5 GiB.
_BYTES = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def size(num_bytes: float) -> str:
    """'1.50 GiB', '12.3 MiB' or '4.5 KiB'."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.1f} KiB"


def parse_size(number: str, unit: str) -> int:
    """Bytes from a number and a binary unit: '1.5' and 'G' are 1.5 GiB."""
    return round(float(number) * _BYTES[unit])
