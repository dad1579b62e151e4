"""The programs of `scripts`, where only the package is installed.

    revnet train --config=digits --workdir=/tmp/digits
    python -m revnet_jax train --help

A config is a file, or the name of an experiment that comes with the package.
"""

import runpy
import sys

from revnet_jax.config.experiments import folder, names


def main() -> None:
    """Runs `scripts/NAME.py` like `python scripts/NAME.py`."""
    programs, name = names("scripts"), (sys.argv[1:] or ["--help"])[0]
    if name in ("--help", "-h", "help"):
        print(f"{(__doc__ or '').rstrip()}\n\nPrograms: {', '.join(programs)}")
        print(f"Experiments: {', '.join(names('configs'))}")
        return
    if name not in programs:
        sys.exit(f"error: got program {name!r}, expected one of {', '.join(programs)}")
    path = str(folder("scripts") / f"{name}.py")
    # The program gets the arguments after its name, as if Python had been given its file.
    sys.argv[:2] = [path]
    runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    main()
