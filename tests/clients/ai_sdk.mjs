// The AI SDK: generateText and streamText over an OpenAI-compatible provider.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const provider = createOpenAICompatible({ name: "nanochat", baseURL: process.env.BASE_URL, includeUsage: true });
const model = provider.chatModel(process.env.MODEL);
const messages = [
  { role: "user", content: "Hello!" }, { role: "assistant", content: "Hello!" }, { role: "user", content: "What is 27 + 58?" },
];
const whole = await generateText({ model, messages, temperature: 0 });
const stream = streamText({ model, system: "Be kind.", prompt: "What is 27 + 58?", temperature: 0 });
let chunks = "";
for await (const chunk of stream.textStream) chunks += chunk;
console.log(JSON.stringify({
  text: whole.text, reason: whole.finishReason, chunks, usage: await stream.usage, reasonStreamed: await stream.finishReason,
}));
