// The page's conversation: what is sent, what is shown, what is kept. Start reading at `ask`.

import { answer, models } from "./api.js";
import { byId, button, isSend, make } from "./dom.js";
import { assistantMessage, failure, note, textOf, userMessage, welcome } from "./messages.js";
import { openSettings, startSettings } from "./settings.js";
import { CONVERSATIONS, key, load, newConversation, save, saveSettings, settings, titleOf, VALID } from "./store.js";

let conversations = load();
let current = conversations[0] ?? newConversation();
let model = "";
let card = null; // what the server says of the model
let running = null; // the AbortController of the answer that is being written
const composer = byId("composer");
const list = byId("messages");

const HELP = "- `/temperature x`: 0 always takes the likeliest token\n- `/topk n`: candidates to draw from, 0 for all\n" +
  "- `/clear`: a new conversation\n- `/help`: this list\n\nAny other line is asked. Enter sends, Shift+Enter starts a new line, Esc stops an " +
  "answer, Ctrl+Shift+O starts a new conversation.";

// ---- sending

function wire(messages) { // as the server wants them: the calculator's calls stay in their places
  const sent = [];
  for (const { role, parts } of messages) {
    const content = parts.every((part) => part.type === "text") ? textOf({ parts }) : parts;
    if (sent.at(-1)?.role === role) sent.at(-1).content += `\n\n${content}`; // a question that got no answer
    else sent.push({ role, content });
  }
  return sent;
}

function grow(message, chunk) {
  if (chunk.text) {
    const last = message.parts.at(-1);
    if (last?.type === "text") last.text += chunk.text;
    else message.parts.push({ type: "text", text: chunk.text });
  }
  if (chunk.event) message.parts.push(chunk.event);
  message.tokens.push(...chunk.tokens);
}

async function ask(fresh = false) {
  const conversation = current;
  const asked = conversation.messages.at(-1);
  const message = { role: "assistant", parts: [], tokens: [] };
  const system = settings.system.trim() ? [{ role: "system", content: settings.system.trim() }] : [];
  const request = {
    ...(model && { model }), messages: [...system, ...wire(conversation.messages)], temperature: settings.temperature,
    top_k: settings.topK, max_tokens: settings.maxTokens,
  };
  if (settings.seed !== null && !fresh) request.seed = settings.seed;
  const shown = assistantMessage(message, regenerate);
  show(shown.element);
  const control = running = new AbortController();
  busy(true);
  const started = performance.now();
  const seconds = () => (performance.now() - started) / 1000;
  const stats = message.stats = { tokens: 0, seconds: 0, first: 0, reason: "" };
  try {
    for await (const chunk of answer(request, key.get(), control.signal)) {
      if (!stats.first) stats.first = seconds();
      grow(message, chunk);
      stats.tokens = chunk.usage?.completion_tokens ?? Math.max(stats.tokens, message.tokens.length);
      if (chunk.reason) [stats.reason, stats.seconds] = [chunk.reason, seconds()];
      if (running === control) { shown.update(false); follow(); }
    }
  } catch (problem) {
    if (problem.name !== "AbortError") {
      shown.element.remove();
      const words = problem instanceof TypeError ? "the server cannot be reached" : problem.message;
      show(failure(words[0].toUpperCase() + words.slice(1) + ".", retry));
      return;
    }
    [stats.reason, stats.seconds] = ["stopped", seconds()];
  } finally {
    if (running === control) { running = null; busy(false); }
  }
  if (conversation.messages.at(-1) !== asked) return; // edited meanwhile: this answers nothing any more
  conversation.messages.push(message);
  const lost = keep(conversation);
  if (lost) show(note(lost));
  shown.update(true);
  onlyLastRegenerates();
  byId("said").textContent = textOf(message);
  follow();
}

function retry(event) {
  keepFocus(() => event.target.closest("article").remove());
  ask();
}

function say(text) {
  if (running) return;
  current.messages.push({ role: "user", parts: [{ type: "text", text }] });
  const lost = keep(current);
  draw();
  if (lost) show(note(lost));
  ask();
}

function edited(index, text) {
  stop();
  current.messages.length = index;
  say(text);
}

function regenerate() {
  if (running) return;
  current.messages.pop();
  draw();
  ask(true);
}

const stop = () => { running?.abort(); running = null; busy(false); };

// ---- slash commands

const COMMANDS = ["/help", "/clear", "/temperature", "/topk"]; // any other line is asked
const isCommand = (line) => COMMANDS.includes(line.split(/\s+/)[0]);

function command(line) {
  const [name, value] = line.split(/\s+/);
  const number = Number(value);
  if (name === "/help") show(note(HELP));
  else if (name === "/clear") start();
  else if (name === "/temperature" && value !== undefined && VALID.temperature(number)) {
    saveSettings({ temperature: number });
    show(note(`Temperature is ${number} now.`));
  } else if (name === "/topk" && value !== undefined && VALID.topK(number)) {
    saveSettings({ topK: number });
    show(note(`Top-k is ${number || "all"} now.`));
  } else if (name === "/temperature") show(note(`Temperature is ${settings.temperature}; \`/temperature 0\` to 2 sets it.`));
  else show(note(`Top-k is ${settings.topK || "all"}; \`/topk 50\` sets it, up to a million.`));
  follow(true);
}

function submit() {
  const text = composer.value.trim();
  if (!text || (running && !isCommand(text))) return;
  composer.value = "";
  fit();
  if (isCommand(text)) command(text);
  else say(text);
}

// ---- showing

const atEnd = () => list.scrollHeight - list.scrollTop - list.clientHeight < 80;
let following = true;
list.addEventListener("scroll", () => { following = atEnd(); });
const follow = (always = false) => { if (following || always) list.scrollTop = list.scrollHeight; };

function show(element) {
  list.querySelector(".welcome")?.remove();
  list.append(element);
  follow(true);
}

function busy(is) {
  byId("send").hidden = is;
  byId("stop").hidden = !is;
}

function onlyLastRegenerates() {
  const all = [...list.querySelectorAll('[data-testid="regenerate"]')];
  for (const one of all.slice(0, -1)) one.remove();
}

function keepFocus(redraw) { // a button that was pressed and is gone leaves it to the composer; not where that opens a keyboard
  const focused = document.activeElement;
  redraw();
  if (!focused.isConnected && !matchMedia("(pointer: coarse)").matches) composer.focus();
}

const draw = () => keepFocus(() => {
  list.replaceChildren();
  for (const [i, message] of current.messages.entries()) {
    if (message.role === "user") list.append(userMessage(message, (text) => edited(i, text)));
    else {
      const shown = assistantMessage(message, regenerate);
      shown.update(true);
      list.append(shown.element);
    }
  }
  onlyLastRegenerates();
  if (!current.messages.length) list.append(welcome(say, card));
  drawHistory();
  follow(true);
});

const drawHistory = () => keepFocus(() => {
  const entries = conversations.map((conversation) => {
    const chosen = conversation === current ? "page" : undefined;
    const open = button(titleOf(conversation), "conversation", () => start(conversation), { "aria-current": chosen });
    const remove = button("✕", "conversation-delete", () => forget(conversation, remove),
      { "aria-label": `Delete ${titleOf(conversation)}` });
    return make("li", {}, open, remove);
  });
  byId("conversations").replaceChildren(...entries);
});

// ---- conversations

function keep(changed) { // unless it was deleted while its answer came; returns what is to be said of the storage
  const same = (c) => c.id === changed.id; // by id: `reread` puts copies in the places of all but the current one
  const listed = conversations.find(same);
  if (!listed && !same(current)) return;
  conversations = [changed, ...conversations.filter((c) => !same(c))];
  if (listed && listed !== changed) drawHistory();
  return save(conversations);
}

function reread() { // another tab has changed the history
  const mine = current.messages.length ? [current] : [];
  conversations = [...mine, ...load().filter((c) => c.id !== current.id)];
  drawHistory();
}

function start(conversation = newConversation()) {
  stop();
  current = conversation;
  document.body.classList.remove("history-open");
  byId("history-toggle").setAttribute("aria-expanded", "false");
  open();
}

function open() {
  draw();
  if (current.messages.at(-1)?.role === "user") show(failure("This was not answered.", retry));
  composer.focus();
}

function forget(conversation, pressed) {
  if (pressed.textContent !== "Delete?") { // the second click means it
    pressed.textContent = "Delete?";
    setTimeout(() => { pressed.textContent = "✕"; }, 3000);
    return;
  }
  conversations = conversations.filter((c) => c !== conversation);
  save(conversations);
  if (conversation === current) start();
  else draw();
}

// ---- starting

function fit() {
  composer.style.height = "auto";
  composer.style.height = `${Math.min(composer.scrollHeight, 200)}px`;
}

async function greet() {
  try {
    [card] = await models(key.get());
    model = card.id;
    byId("model").textContent = card.id;
    if (settings.maxTokens > card.context_length) saveSettings({ maxTokens: card.max_tokens });
    list.querySelector(".welcome")?.replaceWith(welcome(say, card));
  } catch (problem) {
    show(failure(`The server cannot be reached: ${problem.message}.`, (event) => {
      event.target.closest("article").remove();
      greet();
    }));
  }
}

composer.addEventListener("input", fit);
composer.addEventListener("keydown", (event) => {
  if (isSend(event)) { event.preventDefault(); submit(); }
});
byId("send").addEventListener("click", () => { submit(); composer.focus(); });
byId("stop").addEventListener("click", () => { running?.abort(); composer.focus(); });
byId("new-chat").addEventListener("click", () => start());
byId("settings-open").addEventListener("click", openSettings);
byId("history-toggle").addEventListener("click", () => {
  const open = document.body.classList.toggle("history-open");
  byId("history-toggle").setAttribute("aria-expanded", String(open));
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !byId("settings").open) running.abort();
  if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    start();
  }
});
window.addEventListener("storage", (event) => { if (event.key === CONVERSATIONS) reread(); });
startSettings(greet);
open();
greet();
