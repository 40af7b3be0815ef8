"""An engine that shares nothing with vLLM: one dialect is all that it needs."""

import json
import logging
import threading
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_server import PARAMS, PROMPTS, SEEDS, Handler, Listener, bigger
from safetensors.torch import load_file

from stepcredit.errors import UserError
from stepcredit.learn.adapters import add_adapters
from stepcredit.policy.loading import load_policy
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.remote.dialect import Completion, Dialect, Place, Request, Start
from stepcredit.samplers.remote.options import ServerOptions
from stepcredit.samplers.remote.sampler import RemoteSampler


class Curt(Dialect):
    """Everything is a request to one path; greedy completions may be several, and none has log-probabilities."""

    name, manual = "Curt", "docs/curt.md"
    sees_folder = True
    health_path, completions_path, metrics_path = "/up", "/go", "/numbers"
    cache_counters = ("looked_up", "found")

    def command(self, start: Start) -> list[str]:
        return [start.python, "-m", "curt", start.model]

    def environment(self, own: Mapping[str, str]) -> dict[str, str]:
        return dict(own)

    def gives_full_logprobs(self, params: SamplingParams) -> bool:
        return params.temperature == 1

    def number_asked(self, params: SamplingParams, n: int) -> int:
        return n

    def body(self, request: Request, model: str) -> dict:
        return {"do": "sample", "of": model, "ids": request.prompt, "count": request.number, "most": request.limit}

    def read(self, answer: Mapping) -> list[Completion]:
        return [Completion(ids, [-1.0] * len(ids), "length") for ids in answer["drawn"]]

    def models(self, server) -> list[str]:
        return server.post("/go", {"do": "names"})["names"]

    def text(self, server, token_ids):
        return server.post("/go", {"do": "text", "ids": token_ids})["text"]

    def call_workers(self, server, method, *args):
        raise UserError(f"{server.url}: no {method}")

    def versions(self, server) -> set[str]:
        return {server.post("/go", {"do": "say_version"})["version"]}

    def places(self, server, folder: Path) -> list[Place]:
        return [Place("", self.sees_folder, True)]

    def load_folder(self, server, folder: Path, version: str) -> None:
        server.tell("/go", {"do": "load", "folder": str(folder), "version": version})

    def forget(self, server) -> bool:
        return server.post("/go", {"do": "forget"}) == {}

    def commit(self, server, version: str) -> bool:
        return True

    def load_adapter(self, server, name: str, folder: Path) -> None:
        server.tell("/go", {"do": "add", "name": name, "folder": str(folder)})

    def unload_adapter(self, server, name: str) -> None:
        server.tell("/go", {"do": "remove", "name": name})


class CurtServer:
    """What answers `Curt`: completions that count up from the prompt's last token."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.version, self.given, self.done, self.added = tokenizer, "", {}, [], {}

    def reply(self, path: str, body: dict) -> tuple[int, bytes]:
        if path == "/numbers":
            return 200, b"looked_up 4\nfound 1\n"
        if path != "/go":
            return 404, b"what?"
        self.done.append(body["do"])
        found = getattr(self, body["do"])(SimpleNamespace(**body))
        return 200, json.dumps(found or {}).encode()

    def names(self, _):
        return {"names": ["base", *self.added]}

    def text(self, body):
        return {"text": self.tokenizer.decode(body.ids)}

    def sample(self, body):
        assert body.of in ("base", *self.added)
        first = body.ids[-1]
        return {"drawn": [[first + number + at for at in range(body.most)] for number in range(body.count)]}

    def say_version(self, _):
        return {"version": self.version}

    def load(self, body):
        self.given, self.version = load_file(Path(body.folder) / "model.safetensors"), body.version
        return "taken"  # not an object

    def forget(self, _):
        pass

    def add(self, body):
        self.added[body.name] = sorted(path.name for path in Path(body.folder).iterdir())

    def remove(self, body):
        del self.added[body.name]


@pytest.fixture
def server(policy):
    listener = Listener(("127.0.0.1", 0), Handler)
    listener.fake = CurtServer(policy.tokenizer)
    listener.fake.url = f"http://127.0.0.1:{listener.server_port}"
    threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True).start()
    yield listener.fake
    listener.shutdown()
    listener.server_close()


def test_sampling_and_weights(policy, server, caplog):
    caplog.set_level(logging.INFO, "stepcredit")
    with closing(RemoteSampler(Curt(), policy, [server.url])) as sampler:
        names = ["names", "text", "say_version"]
        assert server.done == [*names, "load", "forget", "say_version"]
        assert sampler.metrics == {"sampler/prefix_hits": 0.25}
        assert f"Curt: weights go to {server.url} by folder" in caplog.text
        other = bigger(policy)
        sampler.sync(other)
        assert server.version == sampler.weights.version and server.done[6:] == ["load", "forget", "say_version"]
        saved = other.model.state_dict()
        assert all(torch.equal(tensor, saved[name]) for name, tensor in server.given.items()) and server.given
        groups = sampler.sample(PROMPTS, 2, PARAMS, SEEDS)
        greedy = sampler.sample(PROMPTS[:1], 2, SamplingParams(temperature=0, max_new_tokens=2), SEEDS[:1])
    assert [list(one.token_ids) for one in groups[0]] == [[*range(7, 13)], [*range(8, 14)]]
    assert all(one.columns == {"rollout_logprobs": [-1.0] * 6} for group in groups for one in group)
    assert [list(one.token_ids) for one in greedy[0]] == [[7, 8], [8, 9]] and not greedy[0][0].columns


def test_adapters(server):
    adapted = load_policy("embedded", "cpu")
    add_adapters(adapted, 4, 8.0, [], seed=0)
    with closing(RemoteSampler(Curt(), adapted, [server.url])) as sampler:
        sampler.sync(adapted)
        assert list(server.added) == [sampler.weights.version] and sampler.weights.version.endswith("-2")
        assert "adapter_model.safetensors" in server.added[sampler.weights.version]
        assert sampler.sample(PROMPTS, 1, PARAMS, SEEDS)


def test_it_is_named_in_errors(policy, server, monkeypatch):
    monkeypatch.setattr(Curt, "sees_folder", False)
    with pytest.raises(UserError, match=r"sampler\.server\.transfer: no way .*gloo: .*no stepcredit_arrive"):
        RemoteSampler(Curt(), policy, [server.url])
    monkeypatch.undo()
    monkeypatch.setattr(Curt, "commit", lambda *_: False)
    with pytest.raises(UserError, match=r"has not taken over the weights; restart it as docs/curt\.md says"):
        RemoteSampler(Curt(), policy, [server.url], ServerOptions(transfer="folder"))
    monkeypatch.setattr(Curt, "models", lambda self, server: server.get("/up").json())
    with pytest.raises(UserError, match="does not answer as a Curt server does"):
        RemoteSampler(Curt(), policy, [server.url])
