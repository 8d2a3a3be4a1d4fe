"""OpenAI's own client, asked to speak with a mesh: nothing but the URL is different.

pip install openai
OPENAI_API_KEY="$(interlock token)" python examples/openai_chat.py http://127.0.0.1:8080/v1
"""

import sys

from openai import OpenAI


def main(url: str) -> None:
    """Asks one question and prints the answer as it comes."""
    # The key is read from OPENAI_API_KEY.
    with OpenAI(base_url=url) as client:
        stream = client.chat.completions.create(
            model="gpt-4o-mini",  # an alias: the mesh answers with the model that it serves
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            max_tokens=32,
            stream=True,
        )
        for chunk in stream:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080/v1")
