// The browser's example: gRPC-Web with @connectrpc/connect-web, streamed into the page as it comes.
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcWebTransport } from "@connectrpc/connect-web";

import { GatewayService } from "./gen/interlock/v1/gateway_service_pb.js";

const form = document.querySelector("form");
const answer = document.querySelector("#answer");
const status = document.querySelector("#status");
const stopButton = document.querySelector("#stop");

let stop = new AbortController();
stopButton.addEventListener("click", () => stop.abort());

form.addEventListener("submit", async (submitted) => {
  submitted.preventDefault();
  const { mesh, token, prompt, tokens, deadline } = Object.fromEntries(new FormData(form));
  stop = new AbortController();
  answer.textContent = "";
  show("asking");
  stopButton.disabled = false;
  try {
    await ask(mesh, token, prompt, Number(tokens), Number(deadline));
  } catch (thrown) {
    const error = ConnectError.from(thrown);
    const reason = error.metadata.get("interlock-reason") ?? "-";
    show(`${Code[error.code]} ${reason}: ${error.rawMessage}`);
  } finally {
    stopButton.disabled = true;
  }
});

async function ask(mesh, token, prompt, maxTokens, deadlineS) {
  const client = createClient(GatewayService, createGrpcWebTransport({ baseUrl: mesh }));
  const events = client.generate(
    { input: { case: "text", value: prompt }, maxTokens },
    {
      headers: { authorization: `Bearer ${token}` },
      timeoutMs: deadlineS * 1000,
      signal: stop.signal,
    },
  );
  for await (const { event } of events) {
    if (event.case === "started") show(`answering: ${event.value.model} on ${event.value.workerId}`);
    if (event.case === "chunk") answer.append(event.value.text);
    if (event.case === "finished") show(`finished: ${event.value.usage.completionTokens} tokens`);
  }
}

function show(text) {
  status.textContent = text;
}
