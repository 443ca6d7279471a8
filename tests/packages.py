"""Packages as the registries give them out, made by the tests: a .deb, an npm .tgz, a wheel."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

FILE, LINK, HARD, DEVICE = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE


def tar(files, compression="", *, odd=()):
    """A tar of `files` (name: content); `odd` are (name, type, link target) beside them."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=f"w:{compression}") as packed:
        for name, kind, target in odd:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            packed.addfile(member)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            content = content.encode() if isinstance(content, str) else content
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
    return file.getvalue()


def ar(members):
    """An `ar` archive, the outside of a .deb: names of 16 bytes, sizes in decimal, even places."""
    parts = [b"!<arch>\n"]
    for name, content in members.items():
        parts += [f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode(), content]
        parts += [b"\n"] * (len(content) % 2)
    return b"".join(parts)


def deb(folder: Path, name, files, *, version="1.0-1", odd=(), compression="xz"):
    """A Debian package; names of files begin with ./, as they do there."""
    data = tar({f"./{inside}": content for inside, content in files.items()}, compression, odd=odd)
    path = folder / f"{name}_{version.replace(':', '%3a')}_all.deb"
    control = tar({"./control": f"Package: {name}\n"}, "xz")
    suffix = f".{compression}" if compression else ""
    path.write_bytes(ar({"debian-binary": b"2.0\n", "control.tar.xz": control, f"data.tar{suffix}": data}))
    return path


def npm(folder: Path, name, files, *, version="1.0.0", odd=()):
    about = {"package.json": json.dumps({"name": name, "version": version})}
    path = folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    path.write_bytes(tar({f"package/{inside}": text for inside, text in (about | files).items()}, "gz", odd=odd))
    return path


def wheel(folder: Path, name, files, *, version="1.0"):
    """A wheel; its code ends the process that imports it."""
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for inside, content in files.items():
            packed.writestr(inside, content)
    return path
