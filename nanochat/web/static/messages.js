// How a message looks. An answer is a list of parts: text, calls of the calculator ("python"), and what it answered.

import { button, copy, isSend, make } from "./dom.js";
import { markdown } from "./markdown.js";
import { tokenView } from "./tokens.js";

export const textOf = (message) =>
  message.parts.filter((part) => part.type === "text").map((part) => part.text).join("");

const nameOf = (call) => (/^[\d\s+\-*/().,]*$|\.count\(/.test(call) ? "calculator" : "python");

function partNodes(parts) {
  const nodes = [];
  for (const part of parts) {
    if (part.type === "text") nodes.push(markdown(part.text));
    else if (part.type === "python") {
      nodes.push(make("p", { class: "tool", "data-testid": "tool-call" }, make("span", {}, nameOf(part.text)),
        make("code", {}, part.text)));
    } else nodes.at(-1)?.append(make("span", {}, "="), make("code", {}, part.text));
  }
  return nodes;
}

export function statsOf(message) {
  const { tokens, seconds, first, reason } = message.stats;
  const rate = seconds - first > 0.05 ? ` · ${(Math.max(0, tokens - 1) / (seconds - first)).toFixed(0)} tokens/s` : "";
  const end = { length: " · cut off: longest answer", stopped: " · stopped" }[reason] ?? "";
  return `${tokens} tokens${rate} · first after ${(1000 * first).toFixed(0)} ms${end}`;
}

export function userMessage(message, onEdit) {
  const text = textOf(message);
  const body = make("div", { class: "body" }, text);
  const edit = button("Edit", "edit", () => {
    const box = make("textarea", { "data-testid": "edit-box", "aria-label": "Edit the message", rows: "3" });
    box.value = text;
    const send = () => box.value.trim() && onEdit(box.value.trim());
    box.addEventListener("keydown", (event) => {
      if (isSend(event)) { event.preventDefault(); send(); }
      if (event.key === "Escape") { event.stopPropagation(); body.replaceChildren(text); edit.focus(); }
    });
    body.replaceChildren(box, button("Send again", "edit-send", send));
    box.focus();
  }, { class: "small" });
  const copying = button("Copy", "copy", () => copy(text, copying), { class: "small" });
  return make("article", { "data-testid": "message", "data-role": "user", "aria-label": "You" }, body,
    make("div", { class: "tools" }, edit, copying));
}

// Returns the element and `update`, called as the answer grows.
export function assistantMessage(message, onRegenerate) {
  const body = make("div", { class: "body" });
  const stats = make("span", { class: "stats", "data-testid": "stats" });
  const tools = make("div", { class: "tools" });
  const element = make("article", { "data-testid": "message", "data-role": "assistant", "aria-label": "nanochat" },
    body, tools);
  const update = (done) => {
    body.replaceChildren(...partNodes(message.parts));
    if (!done) return;
    const copying = button("Copy", "copy", () => copy(textOf(message), copying), { class: "small" });
    tools.replaceChildren(copying);
    if (onRegenerate) tools.append(button("Regenerate", "regenerate", onRegenerate, { class: "small" }));
    if (message.tokens?.length) {
      const toggle = button("Tokens", "tokens-toggle", () => {
        const open = element.querySelector(".tokens");
        if (open) open.remove();
        else element.append(tokenView(message.tokens));
        toggle.setAttribute("aria-expanded", String(!open));
      }, { class: "small", "aria-expanded": "false" });
      tools.append(toggle);
    }
    if (message.stats) { stats.textContent = statsOf(message); tools.append(stats); }
  };
  return { element, update };
}

export const note = (text) => make("article", { "data-testid": "message", "data-role": "note" }, markdown(text));

export const failure = (text, onRetry) =>
  make("article", { "data-testid": "message", "data-role": "error", role: "alert" }, make("p", {}, text),
    button("Try again", "retry", onRetry));

const EXAMPLES = ["What is 27 + 58?", 'Spell the word "apple".', "What is the capital of France?", "Who are you?"];

// card: what the server says of its model, or null while it has not said it.
export function welcome(onChoose, card) {
  const offered = card?.suggestions ?? EXAMPLES.map((text) => ({ text }));
  const example = ({ text, expect }) => button(text, "example", () => onChoose(text), expect ? { class: "explained" } : {});
  const examples = offered.map((one) => {
    const made = example(one);
    if (one.expect) made.append(make("small", {}, one.expect));
    return made;
  });
  const section = make("section", { class: "welcome" }, make("h2", {}, "Ask something"),
    make("p", {}, "This is a small language model, trained from scratch. It will be wrong often."));
  if (card?.about) section.append(make("p", {}, card.about));
  if (card?.report) {
    const link = make("a", { href: card.report, target: "_blank", rel: "noopener", "data-testid": "report" }, "report card");
    section.append(make("p", {}, "How it was made, and what it knows: its ", link, "."));
  }
  if (card) section.append(make("div", { class: "examples" }, ...examples));
  return section;
}
