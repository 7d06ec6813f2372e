"""Uploads of exports, to a stand-in for the hub on this machine."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from support import tiny

from peptrain.cli.app import main
from peptrain.errors import ConfigError, PeptrainError
from peptrain.exporting.export import export
from peptrain.exporting.push import check_push, push
from peptrain.models.auto import load_model
from peptrain.training.loop import train

TOKEN = "hf_standin"


@dataclass
class Hub:
    """What the stand-in was told."""

    url: str = ""
    private: bool | None = None
    commits: list[dict[str, Any]] = field(default_factory=list)
    """message, and the contents of the files by name."""
    tags: dict[str, str] = field(default_factory=dict)
    refuses: bool = False

    def answer(self, path: str, body: bytes, token: str | None) -> tuple[int, dict[str, Any]]:
        if self.refuses or token != f"Bearer {TOKEN}":
            return 403, {"error": "Forbidden: this token may not write"}
        if path == "/api/repos/create":
            if self.private is not None:
                return 409, {"error": "exists", "url": f"{self.url}/org/name"}
            asked = json.loads(body)  # by the name of huggingface_hub 2 or 1
            self.private = asked.get("visibility") == "private" or asked.get("private", False)
            return 200, {"url": f"{self.url}/org/name"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/models/org/name/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False}
                                   for n in names]}  # fmt: skip
        if path == "/api/models/org/name/commit/main":
            lines = [json.loads(line) for line in body.splitlines()]
            files = {x["value"]["path"]: base64.b64decode(x["value"]["content"])
                     for x in lines if x["key"] == "file"}  # fmt: skip
            self.commits.append({"message": lines[0]["value"]["summary"], "files": files})
            oid = f"{len(self.commits):040x}"
            where = f"{self.url}/org/name/commit/{oid}"
            return 200, {"success": True, "commitOid": oid, "commitUrl": where}
        if found := re.fullmatch("/api/models/org/name/tag/([0-9a-f]+)", path):
            self.tags[json.loads(body)["tag"]] = found[1]
            return 200, {}
        return 404, {"error": f"the stand-in has no {path}"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    made = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            code, said = made.answer(self.path, self.body(), self.headers.get("Authorization"))
            text = json.dumps(said).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", made.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("pushed") / "run"
    train(tiny("bpt", corpus, run))
    return run


def call(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    code = main([str(arg) for arg in args])
    said = capsys.readouterr()
    return code, re.sub(r"\s+", " ", said.out + said.err)


def test_a_push_uploads_the_verified_export(
    run: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, said = call(capsys, "export", run, "--out", out, "--push", "org/name")
    assert code == 0, said
    assert f"pushed to org/name: {hub.url}/org/name/commit/" in said
    assert hub.private is True
    (made,) = hub.commits
    assert made["message"] == "dense export by peptrain" and not hub.tags
    assert made["files"] == {p.name: p.read_bytes() for p in out.iterdir()}
    assert made["files"]["README.md"].startswith(b"---\nlibrary_name: transformers\n")


@pytest.mark.slow
def test_push_to_hub_of_the_small_model_uploads_its_code_and_it_comes_back(
    corpus: Path, hub: Hub, tmp_path: Path
) -> None:
    """The method that transformers' models have."""
    train(tiny("loro", corpus, tmp_path / "run"))
    small = export(tmp_path / "run", tmp_path / "small", "factorised")
    model: Any = load_model(small, factorised=True)[0].eval()
    model.push_to_hub("org/name")
    (made,) = hub.commits
    assert made["files"].keys() >= {"config.json", "model.safetensors", "modeling_factorised.py"}
    (back := tmp_path / "back").mkdir()
    for name, content in made["files"].items():
        (back / name).write_bytes(content)
    again: Any = load_model(back, factorised=True)[0].eval()
    ids = torch.arange(30)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_all_steps_are_a_commit_and_a_tag_each(
    run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = call(capsys, "export", run, "--push", "org/name", "--step", "all")
    assert code == 0
    assert hub.tags == {"step-6": f"{1:040x}", "step-8": f"{2:040x}"}
    cards = [commit["files"]["README.md"].decode() for commit in hub.commits]
    assert ["| step | 6 of 8 |" in card for card in cards] == [True, False]
    assert "| step | 8 of 8 |" in cards[1]


def test_a_push_without_a_token_is_refused_before_anything_is_exported(
    run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.delenv("HF_TOKEN")
    code, said = call(capsys, "export", run, "--out", tmp_path / "out", "--push", "org/name")
    assert code == 1 and "--push org/name: there is no token of the hub; log in with" in said
    assert not (tmp_path / "out").exists() and hub.private is None


def test_a_name_that_is_none_is_refused(hub: Hub) -> None:
    for name in ("name", "org/name/more", "org/na me", ""):
        with pytest.raises(ConfigError, match=r"--push .*: must be ORG/NAME"):
            check_push(name)


def test_offline_mode_is_respected(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="--push org/name: HF_HUB_OFFLINE forbids it"):
        check_push("org/name")


def test_what_the_hub_refuses_is_one_error(hub: Hub, tmp_path: Path) -> None:
    hub.refuses = True
    (tmp_path / "README.md").write_text("# A card\n")
    with pytest.raises(PeptrainError, match=r"--push org/name: .*403.*check the token's rights"):
        push(tmp_path, "org/name", "a message")


def test_either_a_directory_or_a_repository_is_needed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = call(capsys, "export", run)
    assert (
        code == 1 and "--out: must be a directory to create (got nothing); or give --push" in said
    )
