"""Request text from Triton Inference Server and print it as it arrives.

    irc export build/demo-bundle -o build/triton --layout triton
    tritonserver --model-repository build/triton --model-control-mode explicit --load-model irc_text
    python examples/triton_client.py "def read_lines(path):" --max-tokens 60

Needs `pip install 'tritonclient[grpc]'`. docs/serving.md describes the server and the same request with curl.
"""

from __future__ import annotations

import argparse
import queue
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tritonclient.grpc as triton

TYPES = {"BYTES": np.object_, "INT32": np.int32, "FP32": np.float32, "BOOL": np.bool_}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--url", default="localhost:8001", help="The server's gRPC address.")
    parser.add_argument("--model", default="irc_text")
    parser.add_argument("--max-tokens", type=int, default=60)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--stop", action="append", default=[])
    parser.add_argument("--timeout", type=float, default=60.0, help="Seconds to wait for the next piece.")
    arguments = parser.parse_args()
    inputs = [
        tensor("prompt", "BYTES", [arguments.prompt.encode()]),
        tensor("max_tokens", "INT32", [arguments.max_tokens]),
        tensor("temperature", "FP32", [arguments.temperature]),
        tensor("stream", "BOOL", [True]),
    ]
    if arguments.stop:
        inputs.append(tensor("stop", "BYTES", [mark.encode() for mark in arguments.stop]))
    try:
        with triton.InferenceServerClient(arguments.url) as client:
            for answer in ask(client, arguments.model, inputs, arguments.timeout):
                print(answer.as_numpy("text")[0, 0].decode(), end="", flush=True)
    except (triton.InferenceServerException, queue.Empty) as error:
        print(f"no text from the server: {error or 'it did not answer in time'}", file=sys.stderr)
        return 1
    stopped, skipped = answer.as_numpy("stopped")[0, 0].decode(), float(answer.as_numpy("skipped")[0, 0])
    print(f"\n{stopped}; {skipped:.1%} of the units' work skipped", file=sys.stderr)
    return 0


def tensor(name: str, kind: str, values: list[Any]) -> Any:
    """Return an input of a request, of shape [1, number of values]."""
    request_input = triton.InferInput(name, [1, len(values)], kind)
    request_input.set_data_from_numpy(np.array([values], dtype=TYPES[kind]))
    return request_input


def ask(client: Any, model: str, inputs: list[Any], timeout: float) -> Iterator[Any]:
    """Send a request on a stream and yield its answers. The last one says why the text ended."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    client.async_stream_infer(model_name=model, inputs=inputs)
    while True:
        result, error = answers.get(timeout=timeout)
        if error is not None:
            raise error
        yield result
        if result.get_response().parameters["triton_final_response"].bool_param:
            break
    client.stop_stream()


if __name__ == "__main__":
    sys.exit(main())
