// The official TypeScript client in one session: a call for each line of its standard input, and a line for its outcome.
import { createInterface } from "node:readline";
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";

const transport = new StreamableHTTPClientTransport(new URL(process.argv[2]));
const client = new Client({ name: "typescript", version: "1" });
await client.connect(transport);
console.log(`session ${transport.sessionId}`);
for await (const _ of createInterface({ input: process.stdin })) {
  try {
    await client.callTool({ name: "whoami", arguments: {} });
    console.log("result");
  } catch (error) {
    console.log(`error ${error.code} ${error.message}`);
  }
}
process.exit(0);
