"""Serve a teacher to other runs and machines: a scoring server over HTTP.

Starts the engines of model.teacher, one per GPU (engine.teacher.tensor_parallel GPUs share one), and answers requests
of sequences with the top-k of each token. Runs use it with model.teacher.url=ADDRESS. The first Ctrl-C or SIGTERM
finishes what was accepted, the second ends at once. On an address that other machines reach it needs TLS and a secret
in DISTILL_SERVER_TOKEN, which the clients set too. Routes: /score /sample /health /info /vocabulary /metrics.

examples
  distill serve
  distill serve model.teacher.path=Qwen/Qwen3-8B engine.teacher.tensor_parallel=2
  distill serve model=qwen3_1.7b_4b --max-topk 256 --host 0.0.0.0 --certificate server.crt --key server.key
"""

from pathlib import Path

from distill_cli.verbs.command_line import Arguments, Parser, number


def declare(parser: Parser) -> None:
    parser.add_overrides()
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine alone)")
    parser.add_argument("--port", default="8008", metavar="N", help="port (8008); 0 is any that is free")
    parser.add_argument("--max-topk", metavar="N", help="largest top-k of a request (128, or the vocabulary)")
    parser.add_argument("--max-queued-tokens", metavar="N", help="tokens that may wait (1048576); others come again")
    parser.add_argument("--fixed-batches", action="store_true", help="no two requests at once: the same bits each time")
    parser.add_argument("--certificate", type=Path, metavar="FILE", help="certificate for TLS, in PEM")
    parser.add_argument("--key", type=Path, metavar="FILE", help="its private key, in PEM")


def main(arguments: Arguments) -> int:
    """Serve until a signal; return 0.

    Raises:
        ConfigError: the config, an address or a file is wrong, or the address would be unsafe.
        DistillError: an engine failed.
    """
    from distill_cli.jobs.serving import serve
    from distill_cli.serving.server import Listen

    port = number("--port", arguments.port, at_least=0, at_most=65535)
    listen = Listen(arguments.host, port, arguments.certificate, arguments.key)
    limits = {
        name: number(flag, value, at_least=1)
        for name, flag, value in (
            ("max_topk", "--max-topk", arguments.max_topk),
            ("max_queued_tokens", "--max-queued-tokens", arguments.max_queued_tokens),
        )
        if value is not None
    }
    return serve(arguments.overrides, listen=listen, fixed_batches=arguments.fixed_batches, **limits)
