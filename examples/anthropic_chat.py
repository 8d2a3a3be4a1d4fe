"""Asks a mesh with Anthropic's own Python client (`pip install anthropic`) and prints the answer as it comes.

python examples/anthropic_chat.py http://HOST:PORT TOKEN MODEL "Tell me a story."
"""

from __future__ import annotations

import sys

import anthropic


def main() -> int:
    """Prints one answer; 1 where it fails, with the error's own type and the request's id."""
    url, token, model, prompt = sys.argv[1:]
    client = anthropic.Anthropic(base_url=url, api_key=token)
    turns: list[anthropic.types.MessageParam] = [{"role": "user", "content": prompt}]
    try:
        with client.messages.stream(model=model, max_tokens=64, messages=turns) as stream:
            for text in stream.text_stream:
                print(text, end="", flush=True)
            usage = stream.get_final_message().usage
    except anthropic.APIStatusError as error:
        print(f"{type(error).__name__}: {error} (request {error.request_id})", file=sys.stderr)
        return 1
    print(f"\n[{usage.output_tokens} tokens]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
