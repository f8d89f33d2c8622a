"""A Ray cluster of one machine with two replicas of a tiny model: prints a JSON line when it serves, ends with stdin."""

import json
import sys

import ray
from ray import serve

from dmc.server.ray import Arguments, build


def main():
    directory, port = sys.argv[1], int(sys.argv[2])
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    arguments = Arguments(directory=directory, name="tiny", replicas=2, codec="tcq", page_size=8, device="cpu", health_period=1)
    serve.run(build(arguments), name="dmc", route_prefix="/")
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
