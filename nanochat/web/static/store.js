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

const isPart = (part) => ["text", "python", "python_output"].includes(part?.type) && typeof part.text === "string";
const isMessage = (message) =>
  ["user", "assistant"].includes(message?.role) && Array.isArray(message.parts) && message.parts.every(isPart);

export function load() {
  const found = read(CONVERSATIONS, []);
  if (!Array.isArray(found)) return [];
  return found.filter((c) => typeof c?.id === "string" && Array.isArray(c.messages) && c.messages.every(isMessage));
}

export function save(conversations) {
  let kept = conversations.filter((c) => c.messages.length).map((c) => ({
    ...c,
    messages: c.messages.map((m, i) => (i < c.messages.length - 2 * WITH_TOKENS ? { ...m, tokens: [] } : m)),
  }));
  while (!write(CONVERSATIONS, kept) && kept.length > 1) kept = kept.slice(0, -1); // the oldest goes
}

export const newConversation = () => ({ id: crypto.randomUUID?.() ?? String(Math.random()), messages: [] });

export const titleOf = (conversation) =>
  (conversation.messages[0]?.parts.map((part) => part.text).join("") || "New chat").slice(0, 60);

const USUAL = { temperature: 0.6, topK: 50, maxTokens: 256, seed: null, system: "", theme: "" };

export const settings = { ...USUAL, ...read(SETTINGS, {}) };

export function saveSettings(changes) {
  Object.assign(settings, changes);
  write(SETTINGS, settings);
}

export const key = {
  get: () => { try { return sessionStorage.getItem("nanochat-key") ?? ""; } catch { return ""; } },
  set: (value) => { try { sessionStorage.setItem("nanochat-key", value); } catch { /* only for this request then */ } },
};
