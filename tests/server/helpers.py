"""A tiny model behind a real server: uvicorn in a thread of the test's own process."""

import contextlib
import json
import socket
import threading
import time

import uvicorn

from dmc import LLM
from dmc.engine.service import Service
from dmc.server import Settings, create_app
from dmc.server.run import config
from tests.model import tiny

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'developer' %}{{ raise_exception('no developers') }}{% endif %}"
    "{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def model_directory(path, *, template=True, **changes):
    fields = tiny.config("neuron", max_position_embeddings=512, **changes)
    tiny.write(path, fields, tiny.weights(fields))
    if template:
        config = path / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": TEMPLATE}))
    return path


class Running:
    """A server: its address, the service behind it, and raw sockets to it."""

    def __init__(self, service, port):
        self.service, self.llm, self.port = service, service.llm, port
        self.url = f"http://127.0.0.1:{port}"

    def socket(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def wait_idle(self, seconds=10.0):
        """Returns once nothing runs and no page is held; an error if that takes longer."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not self.service.busy and self.llm.cache.used_pages == 0:
                return
            time.sleep(0.01)
        raise AssertionError(f"{self.llm.cache.used_pages} pages are held, busy: {self.service.busy}")


@contextlib.contextmanager
def serving(directory, *, settings=None, **llm_settings):
    """A server on a free port."""
    llm = LLM(directory, device="cpu", **({"codec": "tcq", "page_size": 8} | llm_settings))
    chosen = Settings(name="tiny", port=0, **(settings or {}))
    service = Service(llm, max_waiting=chosen.max_waiting)
    app = create_app(llm, chosen, service)
    server = uvicorn.Server(config(app, chosen))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Running(service, server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = server.force_exit = True
        thread.join(timeout=20)
        service.stop()
