// The official TypeScript client in one session, which answers what the server asks: for each line of its standard input,
// a tool and a token, a call of the tool, and a line for its outcome.
import { createInterface } from "node:readline";
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";
import {
  CreateMessageRequestSchema,
  ElicitRequestSchema,
  ListRootsRequestSchema,
} from "@modelcontextprotocol/sdk/types.js";

const capabilities = { elicitation: {}, sampling: {}, roots: { listChanged: true } };
const client = new Client({ name: "typescript", version: "1" }, { capabilities });
const answer = (token) => `typescript ${token}`;
client.setRequestHandler(ElicitRequestSchema, async ({ params }, { sendNotification }) => {
  const progressToken = params._meta?.progressToken;
  if (progressToken !== undefined) {
    for (const progress of [1, 2, 3]) {
      const reported = { progressToken, progress, message: params.message };
      await sendNotification({ method: "notifications/progress", params: reported });
    }
  }
  return { action: "accept", content: { said: answer(params.message) } };
});
client.setRequestHandler(CreateMessageRequestSchema, async ({ params }) => {
  const token = params.messages[0].content.text;
  if (token.startsWith("error")) throw new Error(answer(token));
  return { role: "assistant", model: "none", content: { type: "text", text: answer(token) } };
});
client.setRequestHandler(ListRootsRequestSchema, async ({ params }) => {
  const token = params._meta.token;
  return { roots: [{ uri: `file:///${token}`, name: answer(token) }] };
});
const transport = new StreamableHTTPClientTransport(new URL(process.argv[2]));
await client.connect(transport);
console.log(`session ${transport.sessionId}`);
for await (const line of createInterface({ input: process.stdin })) {
  const [tool, token] = line.split(" ");
  const abort = new AbortController();
  const options = { signal: abort.signal, timeout: 25000 };
  if (tool === "wait") options.onprogress = () => abort.abort();
  try {
    const result = await client.callTool({ name: tool, arguments: { token } }, undefined, options);
    console.log(result.content[0].text);
  } catch (error) {
    console.log(abort.signal.aborted ? "cancelled" : `failed ${error.message}`);
  }
}
process.exit(0);
