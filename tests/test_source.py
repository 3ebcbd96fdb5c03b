"""The commit that stands beside results: of the working copy, marked when files differ, none without one."""

import subprocess

import pytest

from ldm import source


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A working copy of one commit, from whose package ``source`` seems to run."""

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.example")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    (tmp_path / "ldm").mkdir()
    (tmp_path / "ldm/source.py").write_text("a = 1\n")
    monkeypatch.setattr(source, "__file__", str(tmp_path / "ldm/source.py"))
    source.source_commit.cache_clear()
    yield tmp_path, git
    source.source_commit.cache_clear()


def test_the_commit_and_whether_files_differ(copy, monkeypatch):
    folder, git = copy
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    monkeypatch.setenv("GIT_DIR", str(folder / "elsewhere"))  # that of a hook, for instance
    commit = source.source_commit()
    assert len(commit) == 12
    (folder / "ldm/source.py").write_text("a = 2\n")
    assert source.source_commit() == commit  # of what was imported
    source.source_commit.cache_clear()
    assert source.source_commit() == f"{commit}-dirty"


def test_an_installed_package_and_a_machine_without_git_have_none(copy, monkeypatch):
    _, git = copy
    assert source.source_commit() is None
    source.source_commit.cache_clear()
    git("init")
    monkeypatch.setenv("PATH", "")
    assert source.source_commit() is None
