"""Numbers as people read them."""


def size(num_bytes: float) -> str:
    """Of a file or of memory, in decimal units."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            break
        num_bytes /= 1000
    return (
        f"{num_bytes:.0f} {unit}" if num_bytes >= 100 or unit == "B" else f"{num_bytes:.1f} {unit}"
    )


def count(number: int) -> str:
    """A large number by its first four digits."""
    for scale, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= scale:
            return f"{number / scale:.4g} {letter}"
    return str(number)
