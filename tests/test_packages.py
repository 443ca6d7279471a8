"""Packages that carry data: unpacked without harm, found, fetched when asked, or named with the way to get them."""

import hashlib
import io
import os
import stat
import sys
import tarfile

import packages as fake
import pytest

from mmpre.data_tools import archives
from mmpre.data_tools.archives import ArchiveError, unpack
from mmpre.data_tools.packages import Apt, Npm, PackageMissingError, Pip, unpacked

STAMPS = Apt("stamps", ("usr/share/stamps",))
WORDS = Npm("@someone/words", "2.0.0")
PICTURES = Pip("fake-pictures", "1.0", "fake_pictures")


def files(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("compression", ["xz", "gz", "bz2", ""])
def test_a_debian_package_is_unpacked_whatever_its_compression(tmp_path, compression):
    path = fake.deb(tmp_path, "a", {"usr/share/a/one.txt": "one", "usr/bin/run": "rm"}, compression=compression)
    unpack(path, tmp_path / "out", inside=("usr/share/",))
    assert files(tmp_path / "out") == {"usr/share/a/one.txt": "one"}


def test_npm_packages_and_wheels_are_unpacked(tmp_path):
    unpack(fake.npm(tmp_path, "@a/b", {"data/x.json": "{}"}), tmp_path / "npm", inside=("package/data/",))
    assert files(tmp_path / "npm") == {"package/data/x.json": "{}"}
    unpack(fake.wheel(tmp_path, "a", {"a/x.csv": "1", "b/y.csv": "2"}), tmp_path / "pip", inside=("a/",))
    assert files(tmp_path / "pip") == {"a/x.csv": "1"}


@pytest.mark.parametrize("name", ["../escaped", "/escaped", "package/../../escaped", "package\\..\\escaped"])
def test_a_name_that_points_outside_is_refused(tmp_path, name):
    (tmp_path / "deep").mkdir()
    tgz, whl = tmp_path / "deep" / "a-1.0.0.tgz", tmp_path / "deep" / "a-1.0-py3-none-any.whl"
    tgz.write_bytes(fake.tar({"package/good": "good", name: "bad"}, "gz"))
    for path in (tgz, fake.wheel(whl.parent, "a", {"good": "good", name: "bad"})):
        with pytest.raises(ArchiveError, match=r"a-1\.0.*escaped' points outside of the archive"):
            unpack(path, tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("*escaped*"))


def test_links_are_passed_over_and_what_follows_them_stays_inside(tmp_path):
    (tmp_path / "secret").write_text("secret")
    odd = [("package/out", fake.LINK, str(tmp_path)), ("package/up", fake.LINK, ".."),
           ("package/hard", fake.HARD, "../secret")]  # fmt: skip
    path = fake.npm(tmp_path, "a", {"out/written": "inside", "good": "good"}, odd=odd)
    unpack(path, tmp_path / "to")
    assert set(files(tmp_path / "to")) == {"package/package.json", "package/out/written", "package/good"}
    assert not any(one.is_symlink() for one in (tmp_path / "to").rglob("*"))
    assert not (tmp_path / "written").exists()
    assert (tmp_path / "secret").read_text() == "secret"


def test_devices_are_refused(tmp_path):
    path = fake.npm(tmp_path, "a", {}, odd=[("package/null", fake.DEVICE, "")])
    with pytest.raises(ArchiveError, match="'package/null' is neither a plain file nor a folder"):
        unpack(path, tmp_path / "to")


def test_set_user_bits_and_owners_are_not_taken_over(tmp_path):
    path = fake.deb(tmp_path, "a", {"usr/share/a/run": "x"})
    unpack(path, tmp_path / "to")
    mode = (tmp_path / "to/usr/share/a/run").stat().st_mode
    assert not mode & (stat.S_ISUID | stat.S_ISGID | stat.S_IWOTH)


def test_an_archive_that_grows_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_BYTES", 1 << 20)
    zeros = {"package/zeros": bytes(8 << 20)}
    for path in (fake.npm(tmp_path, "a", zeros), fake.deb(tmp_path, "a", zeros), fake.wheel(tmp_path, "a", zeros)):
        assert path.stat().st_size < 1 << 17
        with pytest.raises(ArchiveError, match="unpacks to more than 1,048,576 bytes"):
            unpack(path, tmp_path / "to", inside=("nothing/",))  # what is not wanted counts too
    monkeypatch.setattr(archives, "MAX_FILES", 10)
    many = {f"package/{i}": "" for i in range(20)}
    for path in (fake.npm(tmp_path, "b", many), fake.wheel(tmp_path, "b", many)):
        with pytest.raises(ArchiveError, match="holds more than 10 files"):
            unpack(path, tmp_path / "to")


def test_damage_and_foreign_files_are_told(tmp_path):
    good = fake.deb(tmp_path, "a", {"usr/share/a/x": os.urandom(5000)})
    whole = good.read_bytes()
    for content, message in [
        (whole[:-2000], "is damaged"),
        (b"<html>not found</html>", "is no Debian package"),
        (fake.ar({"debian-binary": b"2.0\n"}), "holds no data.tar"),
        (fake.ar({"data.tar.zst": b"x"}), r"holds data\.tar\.zst, which Python cannot decompress; .*dpkg-deb -x"),
    ]:
        good.write_bytes(content)
        with pytest.raises(ArchiveError, match=message):
            unpack(good, tmp_path / "to")
    (tmp_path / "a-1.tgz").write_bytes(b"not gzip")
    with pytest.raises(ArchiveError, match=r"a-1\.tgz: is damaged"):
        unpack(tmp_path / "a-1.tgz", tmp_path / "to")
    with pytest.raises(ArchiveError, match=r"wanted \.deb, \.tgz, \.whl, got \.rar"):
        (tmp_path / "a.rar").touch()
        unpack(tmp_path / "a.rar", tmp_path / "to")


def test_packages_are_found_in_a_source_of_any_shape(tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    archives_ = [
        fake.deb(store, "stamps", {"usr/share/stamps/cat.txt": "cat"}, version="1:2.0-3"),
        fake.npm(store, "@someone/words", {"words.txt": "dog"}, version="2.0.0"),
        fake.wheel(store, "fake-pictures", {"fake_pictures/p.txt": "cow", "other/q.txt": "no"}),
    ]
    fake.npm(store, "@someone/words-more", {"words.txt": "wrong"}, version="9.0.0")
    inside = {"stamps": "usr/share/stamps/cat.txt", "@someone/words": "words.txt", "fake-pictures": "p.txt"}
    with unpacked(STAMPS, WORDS, PICTURES, source=store) as got:
        assert [one.version for one in got] == ["1:2.0-3", "2.0.0", "1.0"]
        assert [(one.folder / inside[one.package]).read_text() for one in got] == ["cat", "dog", "cow"]
        for one, path in zip(got, archives_, strict=True):
            assert one.about()["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        folders = [one.folder for one in got]
    assert not any(folder.exists() for folder in folders), "what was unpacked for a build goes with it"

    for package, path in zip((STAMPS, WORDS, PICTURES), archives_, strict=True):
        bare = tmp_path / "bare" / package.name
        unpack(path, bare)
        with unpacked(package, source=path) as (one,), unpacked(package, source=bare) as (other,):
            assert files(one.folder) == files(other.folder)
            assert "sha256" not in other.about()


def test_a_source_without_the_package_is_refused(tmp_path):
    with pytest.raises(PackageMissingError, match=rf"{tmp_path} holds no apt package stamps; give .*stamps_\*\.deb"):
        with unpacked(STAMPS, source=tmp_path):
            pass
    with pytest.raises(PackageMissingError, match="absent holds no npm package @someone/words or pip package fake"):
        with unpacked(WORDS, PICTURES, source=tmp_path / "absent"):
            pass


@pytest.mark.parametrize(
    ("package", "command"),
    [
        (STAMPS, "apt-get download stamps"),
        (WORDS, "npm pack @someone/words@2.0.0"),
        (PICTURES, "pip download --no-deps --only-binary=:all: fake-pictures==1.0"),
    ],
)
def test_nothing_is_fetched_unasked_and_the_way_to_get_it_is_told(package, command, monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda *a, **k: pytest.fail("something was run"))
    with pytest.raises(PackageMissingError) as e, unpacked(package):
        pass
    assert f"{package.registry} package {package.name}, which is not on this machine" in str(e.value)
    assert f"`{command}`" in str(e.value) and "--source" in str(e.value) and "--fetch" in str(e.value)


def tool(folder, name, script):
    """A package tool of ours, first on the path."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport shutil, sys\n{script}\n")
    path.chmod(0o755)


def test_packages_are_fetched_by_their_own_tool_and_gone_afterwards(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "there").mkdir()
    deb = fake.deb(tmp_path / "there", "stamps", {"usr/share/stamps/cat.txt": "cat"})
    tgz = fake.npm(tmp_path / "there", "@someone/words", {"words.txt": "dog"})
    tool(tmp_path / "bin", "apt-get", f"assert sys.argv[1:] == ['download', 'stamps']; shutil.copy({str(deb)!r}, '.')")
    tool(tmp_path / "bin", "npm", f"assert sys.argv[1:] == ['pack', '@someone/words@2.0.0']\n"
         f"shutil.copy({str(tgz)!r}, '.')")  # fmt: skip
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with unpacked(STAMPS, WORDS, fetch=True) as (stamps, words):
        assert (stamps.folder / "usr/share/stamps/cat.txt").read_text() == "cat"
        assert (words.folder / "words.txt").read_text() == "dog"
        assert stamps.archive == deb.name and words.version == "1.0.0"
    assert not stamps.folder.exists() and not words.folder.exists()


def test_a_missing_or_failing_tool_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PackageMissingError, match=r"apt-get is not on this machine; run `apt-get download stamps`"):
        with unpacked(STAMPS, fetch=True):
            pass
    tool(tmp_path, "apt-get", "sys.exit('E: Unable to locate package stamps')")
    with pytest.raises(PackageMissingError, match=r"failed: E: Unable to locate package stamps; `apt-get update`"):
        with unpacked(STAMPS, fetch=True):
            pass


def test_a_sparse_file_which_may_claim_any_size_is_refused(tmp_path):
    path, info = tmp_path / "a-1.0.0.tgz", tarfile.TarInfo("package/big")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "package/big",
                        "GNU.sparse.realsize": str(1 << 40)}  # fmt: skip
    info.size = 512
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as packed:
        packed.addfile(info, io.BytesIO(b"0\n".ljust(512, b"\0")))
    with pytest.raises(ArchiveError, match="'package/big' is neither a plain file nor a folder"):
        unpack(path, tmp_path / "to")
    assert not (tmp_path / "to/package/big").exists()


def test_a_package_among_others_that_share_its_folder_is_told_by_what_it_alone_brings(tmp_path):
    dutch, czech = (Apt(f"sounds-{lang}", ("usr/sound",), own=f"usr/sound/**/{lang}") for lang in ("nl", "cs"))
    (tmp_path / "usr/sound/level/nl").mkdir(parents=True)
    assert dutch.root(tmp_path) == tmp_path and czech.root(tmp_path) is None
