"The files of the project that are committed; a user's own runs lie beside them."

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def committed(pattern):
    "Return the committed files that match `pattern`, below the project's folder; all files where git knows none."
    done = subprocess.run(["git", "ls-files", "-z", f":(glob){pattern}"], cwd=ROOT, capture_output=True, text=True)
    names = [Path(name) for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    return names or sorted(path.relative_to(ROOT) for path in ROOT.glob(pattern))
