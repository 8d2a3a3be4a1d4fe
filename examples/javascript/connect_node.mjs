// Asks over gRPC-Web with @connectrpc/connect-node and stubs from `npm run generate`.
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcWebTransport } from "@connectrpc/connect-node";

import { GatewayService } from "./gen/interlock/v1/gateway_service_pb.js";
import { fail, options } from "./options.mjs";

const { address, token, prompt, maxTokens, deadlineMs, cancelAfter } = options();

const client = createClient(
  GatewayService,
  createGrpcWebTransport({ baseUrl: `http://${address}`, httpVersion: "1.1" }),
);

const stop = new AbortController();
let chunks = 0;
try {
  const events = client.generate(
    { input: { case: "text", value: prompt }, maxTokens },
    { headers: { authorization: `Bearer ${token}` }, timeoutMs: deadlineMs, signal: stop.signal },
  );
  for await (const { event } of events) {
    if (event.case !== "chunk") continue;
    process.stdout.write(event.value.text);
    if (++chunks === cancelAfter) stop.abort();
  }
  process.stdout.write("\n");
} catch (thrown) {
  const error = ConnectError.from(thrown);
  fail(name(error.code), error.metadata.get("interlock-reason"), error.rawMessage);
}

// `Code.DeadlineExceeded` as every other language writes it.
function name(code) {
  return Code[code].replace(/(?<=[a-z])(?=[A-Z])/g, "_").toUpperCase();
}
