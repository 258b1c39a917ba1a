// openai for Node: models, an answer whole, and the client's own stream helper.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: "any", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const messages = [{ role: "user", content: "What is 27 + 58?" }];
const whole = await client.chat.completions.create({ model, messages, temperature: 0 });
const stream = client.chat.completions.stream({ model, messages, temperature: 0 });
let deltas = "";
stream.on("content", (delta) => { deltas += delta; });
const last = (await stream.finalChatCompletion()).choices[0].message;
const lists = await client.completions.create({ model, prompt: ["One", "Two"], max_tokens: 2 });
console.log(JSON.stringify({
  text: whole.choices[0].message.content, streamed: last.content, deltas, events: last.events,
  indices: lists.choices.map((choice) => choice.index),
}));
