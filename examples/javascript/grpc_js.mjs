// Asks over native gRPC with @grpc/grpc-js; the contract's own .proto files are all that it needs.
import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

import { fail, options } from "./options.mjs";

const { address, token, prompt, maxTokens, deadlineMs, cancelAfter } = options();

const protos = fileURLToPath(new URL("../../protos", import.meta.url));
const contract = loader.loadSync("interlock/v1/gateway_service.proto", { includeDirs: [protos], longs: String });
const { GatewayService } = grpc.loadPackageDefinition(contract).interlock.v1;

const client = new GatewayService(address, grpc.credentials.createInsecure());
const metadata = new grpc.Metadata();
metadata.set("authorization", `Bearer ${token}`);

const call = client.Generate({ text: prompt, maxTokens }, metadata, { deadline: Date.now() + deadlineMs });
let chunks = 0;
call.on("data", (event) => {
  if (!event.chunk) return;
  process.stdout.write(event.chunk.text);
  if (++chunks === cancelAfter) call.cancel();
});
call.on("error", (error) => {
  // The mesh's own reason and delay stand in plain trailing metadata.
  fail(grpc.status[error.code], error.metadata.get("interlock-reason")[0], error.details);
});
call.on("status", () => client.close());
call.on("end", () => process.stdout.write("\n"));
