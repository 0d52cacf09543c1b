"""Which files differ from a commit. Without the library, which a runner of mutants must not import."""

import subprocess
from pathlib import Path


def changed(root: Path, base: str) -> set[str]:
    """The files, from the root, that differ from a commit, and those that git does not know."""
    found = _git(root, "diff", "--no-renames", "--name-only", base)
    return {*found, *_git(root, "ls-files", "--others", "--exclude-standard")}


def changed_in_branch(root: Path, base: str) -> set[str]:
    """As `changed`, of the commit where this branch left `base`."""
    return changed(root, *_git(root, "merge-base", base, "HEAD"))


def _git(root: Path, *arguments: str) -> list[str]:
    """The lines that git answers; raises ValueError with its complaint."""
    ran = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    if ran.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {ran.stderr.strip() or 'nothing found'}")
    return ran.stdout.splitlines()
