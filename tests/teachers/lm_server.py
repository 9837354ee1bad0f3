"""A language model behind HTTP as a process: prints its two ports, and ends when its standard input does.

It answers as vLLM 0.32 (`vllm`; `echo` without its own fields), SGLang 0.5 (`sglang`), servers that name tokens by
text (`text`) and llama.cpp (`none`, which ignores `echo`) do, and as badly as it is told to: `POST /settings` changes
`Settings` and returns what was asked of the server since.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Settings:
    """How the server behaves.

    Args:
        flavour: "vllm", "echo", "sglang", "text" or "none".
        key: wanted as a bearer token.
        names: models it lists.
        context: of its models.
        tells_context: whether it lists it with them, as vLLM does.
        most: entries that a position may have at most.
        faults: what happens to the next requests for log-probabilities, one after another: `status` (with
            `retry_after`) is answered; `do` is "hang up", "break off", "stall" or "die"; {} is none.
        spoil: what is done to answers: "forget" (asked again, the first positions are missing), "shorten", "shift"
            (other tokens come back), "nan", "null" (after the token `<eos>`), "logits", "noise", "few" (too few
            entries), "counted" (the token that was sent is one of those asked for), "html".
        together: answer only when so many requests are waiting.
    """

    flavour: str = "vllm"
    key: str | None = None
    names: list[str] = field(default_factory=lambda: ["tiny"])
    context: int = 128
    tells_context: bool = True
    most: int = 40
    faults: list[dict[str, Any]] = field(default_factory=list)
    spoil: str = ""
    together: int = 1


class Model:
    """A model and its tokenizer, and the log-probabilities of prompts."""

    def __init__(self, folder: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.vocab_size = self.model.config.vocab_size
        self.lock = threading.Lock()

    def logprobs(self, prompt: list[int]) -> list[list[float]]:
        """Of every id after each token of the prompt."""
        with self.lock, self.torch.inference_mode():
            return self.torch.log_softmax(self.model(self.torch.tensor([prompt])).logits[0], -1).tolist()

    def text(self, number: int) -> str:
        return str(self.tokenizer.decode([number]))


class State:
    """What all requests share."""

    def __init__(self, model: Model) -> None:
        self.model, self.settings = model, Settings()
        self.seen: set[tuple[int, ...]] = set()
        self.changed = threading.Condition()
        self.noise = itertools.count()
        self.asked = self.waiting = self.most_waiting = 0

    def wait(self, fields: dict[str, Any]) -> None:
        """Until so many requests have come as `wait_asked` says."""
        wanted = fields.pop("wait_asked", 0)
        self.changed.wait_for(lambda: self.asked >= wanted)

    def change(self, fields: dict[str, Any]) -> dict[str, Any]:
        """New settings; returns what happened under the old ones."""
        with self.changed:
            self.wait(fields)
            report = {"asked": self.asked, "most_waiting": self.most_waiting, "settings": asdict(self.settings)}
            if fields.pop("reset", False):
                self.settings, self.asked, self.most_waiting = Settings(), 0, 0
                self.seen.clear()
            for name, value in fields.items():
                setattr(self.settings, name, value)
            self.changed.notify_all()
        return report


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked has hung up."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.refused():
            return
        settings = self.state.settings
        listed: list[dict[str, Any]] = [{"id": name, "object": "model", "owned_by": "vllm"} for name in settings.names]
        for model in listed if settings.tells_context else []:
            model["max_model_len"] = settings.context
        known = self.path == "/v1/models"
        self.answer({"object": "list", "data": listed} if known else {"detail": "Not Found"}, 200 if known else 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        path = "/generate" if self.state.settings.flavour == "sglang" and "input_ids" in body else "/v1/completions"
        if self.path == "/settings":
            self.answer(self.state.change(body))
        elif self.refused() or self.fault():
            pass
        elif self.path == path:
            self.waited()
            self.complete(body)
        else:
            self.answer({"detail": "Not Found"}, 404)

    def refused(self) -> bool:
        """Whether the key is wrong."""
        key = self.state.settings.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return False
        self.answer({"error": f"Unauthorized: {self.headers.get('Authorization')}"}, 401)
        return True

    def fault(self) -> bool:
        """Meet the next fault, if there is one."""
        state = self.state
        with state.changed:
            state.asked += 1
            state.changed.notify_all()
            fault = state.settings.faults.pop(0) if state.settings.faults else {}
        if "status" in fault:
            said = {"error": {"message": f"try later, {self.headers.get('Authorization')}"}}
            self.answer(said, fault["status"], {"Retry-After": fault["retry_after"]} if "retry_after" in fault else {})
        elif fault.get("do") == "hang up":
            self.close_connection = True
        elif fault.get("do") == "break off":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices":')
            self.close_connection = True
        elif fault.get("do") == "stall":
            self.rfile.read(1)  # until the other side hangs up
            self.close_connection = True
        elif fault.get("do") == "die":
            os._exit(1)
        return bool(fault)

    def waited(self) -> None:
        """Wait until as many requests are here as the settings say."""
        state = self.state
        with state.changed:
            state.waiting += 1
            state.most_waiting = max(state.most_waiting, state.waiting)
            state.changed.notify_all()
            state.changed.wait_for(lambda: state.most_waiting >= state.settings.together)
            state.waiting -= 1

    def complete(self, body: dict[str, Any]) -> None:
        settings, model = self.state.settings, self.state.model
        prompt = body.get("prompt", body.get("input_ids"))
        count = body.get("prompt_logprobs") or body.get("top_logprobs_num") or body.get("logprobs") or 0
        said = None
        if "prompt" in body and body["model"] not in settings.names:
            return self.refuse(f"The model `{body['model']}` does not exist.", 404)
        if count > settings.most:
            said = f"Requested prompt logprobs of {count}, which is greater than max allowed: {settings.most}"
        if max(prompt) >= model.vocab_size:
            said = f"Token id {max(prompt)} is out of vocabulary"
        if len(prompt) + 1 > settings.context:
            said = f"This model's maximum context length is {settings.context} tokens."
        if said:
            return self.refuse(f"{said} (asked with {self.headers.get('Authorization')})", 400)
        if settings.spoil == "html":
            return self.send(b"<html>a gateway's page</html>", 200, {"Content-Type": "text/html"})
        rows = self.rows(prompt, count)
        return self.answer(FLAVOURS[settings.flavour](model, body, prompt, rows))

    def refuse(self, message: str, status: int) -> None:
        self.answer({"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}, status)

    def rows(self, prompt: list[int], count: int) -> list[dict[int, float] | None]:
        """Before each token, and before the one that is generated: the token itself and the most probable ones."""
        spoil, whole = self.state.settings.spoil, self.state.model.logprobs(prompt)
        rows: list[dict[int, float] | None] = [None]
        for position, logprobs in enumerate(whole):
            order = sorted(range(len(logprobs)), key=lambda number: -logprobs[number])
            after = [prompt[position + 1]] if position + 1 < len(prompt) else order[:1]
            kept = dict.fromkeys([*after, *order[: count - {"few": 3, "counted": 1}.get(spoil, 0)]])
            rows.append({number: logprobs[number] for number in kept})
        if spoil == "noise":
            shift = -0.5 * next(self.state.noise)
            rows = [row and {number: value + shift for number, value in row.items()} for row in rows]
        if spoil == "nan" and rows[2]:
            rows[2] = dict.fromkeys(rows[2], float("nan"))
        if spoil == "null":
            rows = [
                dict.fromkeys(row, float("nan")) if row and prompt[position] == 0 else row
                for position, row in enumerate(rows, -1)
            ]
        if spoil == "logits":
            rows = [row and {number: value + 30 for number, value in row.items()} for row in rows]
        if spoil == "shift":
            rows = [row and {(number + 1) % 300: value for number, value in row.items()} for row in rows]
        if spoil == "shorten":
            rows = rows[:-2] + rows[-1:]
        if spoil == "forget" and tuple(prompt) in self.state.seen:
            rows[1:3] = [None, None]
        if count > 1:
            self.state.seen.add(tuple(prompt))
        return rows

    def answer(self, document: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        text = json.dumps(document)
        # As serialisers do that have no NaN.
        text = text.replace("NaN", "null") if self.state.settings.spoil == "null" else text
        self.send(text.encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


Rows = list[dict[int, float] | None]


def vllm(model: Model, body: dict[str, Any], prompt: list[int], rows: Rows) -> dict[str, Any]:
    answer = none(model, body, prompt, rows) if not body.get("echo") else echo(model, body, prompt, rows)
    told: list[Any] = []
    for row in rows[:-1]:
        order = sorted(row.values(), reverse=True) if row else []
        entries = (row or {}).items()
        told.append(
            row
            and {
                str(number): {"logprob": value, "rank": order.index(value) + 1, "decoded_token": model.text(number)}
                for number, value in entries
            }
        )
    answer["choices"][0]["prompt_logprobs"] = told if body.get("prompt_logprobs") else None
    return answer


def none(model: Model, body: dict[str, Any], prompt: list[int], rows: Rows) -> dict[str, Any]:
    return named(model, body, [], rows[-1:], model.text)


def echo(model: Model, body: dict[str, Any], prompt: list[int], rows: Rows) -> dict[str, Any]:
    by_id = body.get("return_tokens_as_token_ids")
    return named(model, body, prompt, rows, (lambda number: f"token_id:{number}") if by_id else model.text)


def text(model: Model, body: dict[str, Any], prompt: list[int], rows: Rows) -> dict[str, Any]:
    return named(model, body, prompt, rows, model.text)


def named(model: Model, body: dict[str, Any], prompt: list[int], rows: Rows, name: Any) -> dict[str, Any]:
    """A completion in OpenAI's form. The token that a row holds first is the one that was sent, or generated."""
    last = rows[-1] or {}
    generated = next(iter(last))
    numbers = [next(iter(row)) if row else prompt[0] for row in rows[:-1]] if prompt else []
    values = [row[number] if row else None for row, number in zip(rows, [*numbers, generated], strict=True)]
    logprobs = {
        "text_offset": [0] * len(rows),
        "tokens": [name(number) for number in [*numbers, generated]],
        "token_logprobs": values,
        "top_logprobs": [row and {name(number): value for number, value in row.items()} for row in rows],
    }
    said = "".join(model.text(number) for number in [*prompt, generated])
    told = logprobs if body.get("logprobs") is not None else None
    choice = {"index": 0, "text": said, "logprobs": told, "finish_reason": "length"}
    return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]}


def sglang(model: Model, body: dict[str, Any], prompt: list[int], rows: Rows) -> dict[str, Any]:
    if "input_ids" not in body:
        return text(model, body, prompt, rows)
    with_text = body["return_text_in_logprobs"]
    tokens: list[Any] = [[None, prompt[0], None]]
    top: list[Any] = [None]
    for row in rows[1:-1]:
        assert row
        entries = [[value, number, model.text(number) if with_text else None] for number, value in row.items()]
        tokens.append(entries[0])
        # SGLang does not repeat the token itself.
        top.append(sorted(entries, key=lambda entry: -entry[0])[: body["top_logprobs_num"]])
    return {"text": "", "meta_info": {"input_token_logprobs": tokens, "input_top_logprobs": top}}


FLAVOURS = {"vllm": vllm, "echo": echo, "sglang": sglang, "text": text, "none": none}


def main(folder: str) -> None:
    class Mine(Handler):
        state = State(Model(folder))

    servers = [Server(("127.0.0.1", 0), Mine) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    print(*(server.server_port for server in servers), flush=True)  # noqa: T201
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
