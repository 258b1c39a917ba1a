// A model's Markdown as DOM nodes. markdown-it (vendor/) makes tokens of it, and only what stands in TAGS becomes an
// element, with no attribute of the text but an address on the web: nothing that a model writes can become markup.

import { button, copy, make } from "./dom.js";
import MarkdownIt from "./vendor/markdown-it.js";

const DEEPEST = 8; // lists within lists, quotations within quotations; what is deeper stays text
const TAGS = new Set(("p h1 h2 h3 h4 h5 h6 blockquote ul ol li table thead tbody tr th td strong em s a hr").split(" "));

function safe(address) {
  try {
    return ["http:", "https:"].includes(new URL(address).protocol);
  } catch {
    return false;
  }
}

const parser = new MarkdownIt({ html: false, linkify: false, breaks: true }).disable("image");
parser.validateLink = safe; // a link elsewhere than to the web stays as it was written
parser.block.ruler.before("table", "deep", (state, start, end, silent) => {
  const quoted = state.src[state.bMarks[start] + state.tShift[start]] === ">";
  if (silent || state.level < (quoted ? DEEPEST : 2 * DEEPEST)) return false; // a list and its item are two levels
  state.line = end;
  state.push("paragraph_open", "p", 1);
  Object.assign(state.push("inline", "", 0), { content: state.getLines(start, end, 0, false).trim(), children: [] });
  state.push("paragraph_close", "p", -1);
  return true;
});

function codeBlock(text) {
  const copying = button("Copy code", "copy-code", () => copy(text, copying), { class: "small" });
  return make("div", { class: "code" }, copying, make("pre", { tabindex: "0" }, make("code", {}, text)));
}

function element(token) {
  if (token.tag === "a") return make("a", { href: token.attrGet("href"), target: "_blank", rel: "noopener noreferrer" });
  if (/^h\d$/.test(token.tag)) return make(`h${Math.min(6, Number(token.tag[1]) + 2)}`); // the page has two of its own
  const side = /right|center/.exec(token.attrGet("style") ?? "")?.[0]; // of a table's column
  return make(token.tag, { start: token.tag === "ol" ? token.attrGet("start") : null, class: side });
}

function build(tokens, into) {
  const open = [into];
  for (const token of tokens) {
    const here = open.at(-1);
    if (token.type === "inline") build(token.children, here);
    else if (token.type === "fence" || token.type === "code_block") here.append(codeBlock(token.content.replace(/\n$/, "")));
    else if (token.type === "code_inline") here.append(make("code", {}, token.content));
    else if (token.type === "softbreak" || token.type === "hardbreak") here.append(make("br"));
    else if (token.hidden) continue; // a paragraph of a list without empty lines
    else if (!TAGS.has(token.tag)) here.append(token.content);
    else if (token.nesting === -1) open.pop();
    else {
      here.append(element(token));
      if (token.nesting === 1) open.push(here.lastChild);
    }
  }
  return into;
}

export const markdown = (text) => build(parser.parse(text, {}), document.createDocumentFragment());
