// The token view: what an answer is made of, how sure the model was of each token, and what else it thought of.

import { make } from "./dom.js";

const visible = (text) => text.replace(/ /g, "·").replace(/\n/g, "↵").replace(/\t/g, "→") || "∅";
const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)}%`;

function alternatives(token) {
  const same = (other) => other.bytes.join() === token.bytes.join(); // half characters look all the same
  const drawnBelow = token.top_logprobs.some(same) ? [] : [token];
  const rows = [...token.top_logprobs, ...drawnBelow].map((other) => {
    const bar = make("span", { class: "bar", "aria-hidden": "true" });
    bar.style.setProperty("--p", Math.exp(other.logprob).toFixed(4));
    return make("li", same(other) ? { class: "taken", "aria-current": "true" } : {}, make("code", {}, visible(other.token)), bar, percent(other.logprob));
  });
  return make("ol", {}, ...rows);
}

export function tokenView(tokens) {
  const shown = make("div", { class: "alternatives", "data-testid": "alternatives", "aria-live": "polite" });
  const buttons = tokens.map((token) => {
    const label = `${visible(token.token)}, ${percent(token.logprob)}`;
    const one = make("button", { class: "token", "data-testid": "token", "aria-label": label, title: label,
      onclick: () => {
        for (const other of buttons) other.removeAttribute("aria-pressed");
        one.setAttribute("aria-pressed", "true");
        shown.replaceChildren(alternatives(token));
      } }, visible(token.token));
    one.style.setProperty("--p", Math.exp(token.logprob).toFixed(4));
    return one;
  });
  const words = "An answer is drawn token by token. The paler a token, the less likely it was; " +
    "choose one to see what else could have stood there.";
  return make("div", { class: "tokens" }, make("p", {}, words), make("div", { class: "row" }, ...buttons), shown);
}
