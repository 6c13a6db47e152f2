"""Models of the hub: the weights in any form, and the model's own tokenizer, are downloaded, and nothing else."""

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from conftest import refused, run, save_model
from safetensors.torch import load_file

COMMIT = "c" * 40


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        files = {path.name: path for path in self.server.folder.iterdir()}
        path = self.path.split("?")[0]
        if re.fullmatch(r"/api/models/owner/name(/revision/[^/]+)?", path):
            siblings = [{"rfilename": name} for name in files]
            facts = {"id": "owner/name", "modelId": "owner/name", "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(facts).encode(), Content_Type="application/json")
        elif re.fullmatch(r"/api/models/owner/name/tree/[^/]+", path):
            facts = [{"type": "file", "oid": "d" * 40, "size": f.stat().st_size, "path": n} for n, f in files.items()]
            self.answer(200, json.dumps(facts).encode(), Content_Type="application/json")
        elif (found := re.fullmatch(r"/owner/name/resolve/[^/]+/(.*)", path)) and found[1] in files:
            body = files[found[1]].read_bytes()
            if self.command == "GET":
                self.server.read.add(found[1])
            etag = f'"{hashlib.sha256(body).hexdigest()}"'
            self.answer(200, body, ETag=etag, X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
        else:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")

    def do_HEAD(self):
        self.do_GET()


@pytest.fixture
def hub(tmp_path):
    (tmp_path / "hub").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), Request) as server:
        server.daemon_threads, server.folder, server.read = True, tmp_path / "hub", set()
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def sample(hub, cwd, check=True):
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(cwd / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    options = ("--ckpt", "owner/name", "--prompt", "Ana took", "--tokens", 8, "--temperature", 0, "--device", "cpu")
    return run("sample.py", *options, cwd=cwd, check=check, **environment)


def as_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return {"pytorch_model.bin"}


def as_shards(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    files = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, part in files.items():
        torch.save({name: state[name] for name in part}, folder / file)
    places = {name: file for file, part in files.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return {*files, "pytorch_model.bin.index.json"}


def with_both(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    return {"model.safetensors"}


@pytest.mark.parametrize("form", [as_pickle, as_shards, with_both])
def test_a_model_is_downloaded_in_each_form_with_its_own_tokenizer(hub, tmp_path, form):
    save_model(hub.folder, seed=1)
    weights = form(hub.folder)
    (hub.folder / "onnx.bin").write_bytes(b"0" * 100)
    local = run(
        "sample.py", "--ckpt", hub.folder, "--prompt", "Ana took", "--tokens", 8, "--temperature", 0, cwd=tmp_path
    )
    result = sample(hub, tmp_path)
    assert result.stdout == local.stdout
    texts = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert hub.read == texts | weights


def test_a_model_of_the_hub_with_another_tokenizer_is_refused_by_name(hub, tmp_path):
    save_model(hub.folder, seed=1)
    spec = json.loads((hub.folder / "tokenizer.json").read_text())
    spec["pre_tokenizer"]["add_prefix_space"] = True
    (hub.folder / "tokenizer.json").write_text(json.dumps(spec))
    assert "pre_tokenizer.add_prefix_space is True" in refused(sample(hub, tmp_path, check=False))


def test_a_repository_without_weights_is_refused_in_one_line(hub, tmp_path):
    save_model(hub.folder, seed=1)
    (hub.folder / "model.safetensors").unlink()
    assert "contains neither model.safetensors nor pytorch_model.bin" in refused(sample(hub, tmp_path, check=False))
