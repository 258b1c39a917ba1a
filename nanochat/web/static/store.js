// What the browser keeps: conversations and settings in localStorage, the API key for this tab only. Storage that is
// full, damaged or forbidden costs the history, never the chat.

export const CONVERSATIONS = "nanochat-conversations";
const SETTINGS = "nanochat-settings";
const WITH_TOKENS = 4; // answers of a conversation whose tokens are kept: they are large

function read(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function write(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

const isNumber = Number.isFinite; // of a number, and of nothing else
const isPart = (part) => ["text", "python", "python_output"].includes(part?.type) && typeof part.text === "string";
const isMessage = (message) =>
  ["user", "assistant"].includes(message?.role) && Array.isArray(message.parts) && message.parts.every(isPart);
const isSaid = (token) => typeof token?.token === "string" && isNumber(token.logprob) && Array.isArray(token.bytes);
const isToken = (token) => isSaid(token) && Array.isArray(token.top_logprobs) && token.top_logprobs.every(isSaid);
const isStats = (stats) => [stats?.tokens, stats?.seconds, stats?.first].every(isNumber);

// What of a message makes sense: its text must; its tokens and its statistics may be missing.
const sound = ({ role, parts, tokens, stats }) => ({
  role, parts: parts.map(({ type, text }) => ({ type, text })),
  ...(Array.isArray(tokens) && tokens.every(isToken) && { tokens }), ...(isStats(stats) && { stats }),
});

export function load() {
  const found = read(CONVERSATIONS, []);
  if (!Array.isArray(found)) return [];
  const whole = found.filter((c) => typeof c?.id === "string" && Array.isArray(c.messages) && c.messages.every(isMessage));
  return whole.map(({ id, messages }) => ({ id, messages: messages.map(sound) }));
}

const bare = (messages, from) => messages.map((m, i) => (i < from ? { ...m, tokens: [] } : m));
let shown = ""; // what was said already of the storage

// Keeps them. Where there is too little room, the tokens of the oldest go first, then the oldest conversations. Returns
// what is to be said of that, once.
export function save(conversations) {
  const kept = conversations.filter((c) => c.messages.length)
    .map((c) => ({ ...c, messages: bare(c.messages, c.messages.length - 2 * WITH_TOKENS) }));
  let lost = "";
  for (let i = kept.length - 1; !write(CONVERSATIONS, kept); i -= 1) {
    if (i >= 0) {
      kept[i].messages = bare(kept[i].messages, kept[i].messages.length);
      lost = "The browser's storage is full: of older conversations the tokens are no longer kept, only the text.";
    } else if (kept.length > 1) {
      kept.pop();
      lost = "The browser's storage is full: the oldest conversations are no longer kept.";
    } else return first("This browser keeps nothing here: the conversation is gone when the page is closed.");
  }
  return first(lost);
}

function first(words) {
  if (words === shown) return "";
  if (words) shown = words;
  return words;
}

export const newConversation = () => ({ id: crypto.randomUUID?.() ?? String(Math.random()), messages: [] });

export const titleOf = (conversation) =>
  (conversation.messages[0]?.parts.map((part) => part.text).join("") || "New chat").slice(0, 60);

const USUAL = { temperature: 0.6, topK: 50, maxTokens: 256, seed: null, system: "", theme: "" };

// What the server takes (web/schema.py). A number beyond the safe ones is no whole number in JSON.
export const VALID = {
  temperature: (x) => isNumber(x) && x >= 0 && x <= 2, topK: (x) => Number.isInteger(x) && x >= 0 && x <= 1e6,
  maxTokens: (x) => Number.isSafeInteger(x) && x >= 1, seed: (x) => x === null || Number.isSafeInteger(x),
  system: (x) => typeof x === "string", theme: (x) => ["", "dark", "light"].includes(x),
};
const stored = read(SETTINGS, {});

export const settings = Object.fromEntries(
  Object.entries(USUAL).map(([name, usual]) => [name, VALID[name](stored[name]) ? stored[name] : usual]));

export function saveSettings(changes) { // one that is not valid stays as it was
  for (const [name, value] of Object.entries(changes)) if (VALID[name](value)) settings[name] = value;
  write(SETTINGS, settings);
}

export const key = {
  get: () => { try { return sessionStorage.getItem("nanochat-key") ?? ""; } catch { return ""; } },
  set: (value) => { try { sessionStorage.setItem("nanochat-key", value); } catch { /* only for this request then */ } },
};
