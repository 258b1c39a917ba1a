// The Markdown that a small model writes, as DOM nodes: paragraphs, headings, lists, quotations, tables, code, links.
// What it does not know stays text.

import { button, copy, make } from "./dom.js";

const INLINE = /`([^`]+)`|\*\*([^*]+)\*\*|\*([^*\s][^*]*)\*|\[([^\][]+)\]\(([^()\s]+)\)/g;

function safe(address) {
  try {
    const url = new URL(address);
    return ["http:", "https:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

function inline(text) {
  const nodes = [];
  let done = 0;
  for (const found of text.matchAll(INLINE)) {
    const [whole, code, bold, italic, label, address] = found;
    let node = null;
    if (code !== undefined) node = make("code", {}, code);
    else if (bold !== undefined) node = make("strong", {}, ...inline(bold));
    else if (italic !== undefined) node = make("em", {}, ...inline(italic));
    else if (safe(address)) {
      node = make("a", { href: safe(address), target: "_blank", rel: "noopener noreferrer" }, label);
    }
    if (node === null) continue; // a link elsewhere than to the web stays as it was written
    nodes.push(text.slice(done, found.index), node);
    done = found.index + whole.length;
  }
  nodes.push(text.slice(done));
  return nodes;
}

function codeBlock(lines) {
  const text = lines.join("\n");
  const copying = button("Copy code", "copy-code", () => copy(text, copying), { class: "small" });
  return make("div", { class: "code" }, copying, make("pre", { tabindex: "0" }, make("code", {}, text)));
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function table(lines) {
  const row = (line, tag) => make("tr", {}, ...cells(line).map((cell) => make(tag, {}, ...inline(cell))));
  const body = lines.slice(2).map((line) => row(line, "td"));
  return make("table", {}, make("thead", {}, row(lines[0], "th")), make("tbody", {}, ...body));
}

function paragraph(lines) {
  const nodes = lines.flatMap((line, i) => (i ? [make("br"), ...inline(line)] : inline(line)));
  return make("p", {}, ...nodes);
}

const KINDS = [ // the first that fits a line decides what its block is
  ["code", /^```/],
  ["heading", /^(#{1,6})\s+(.*)/],
  ["quote", /^>\s?/],
  ["bullets", /^\s*[-*+]\s+/],
  ["numbers", /^\s*\d{1,9}[.)]\s+/],
];

function kindOf(lines, i) {
  if (lines[i].includes("|") && /^\s*\|?\s*:?-+/.test(lines[i + 1] ?? "") && lines[i + 1].includes("|")) return "table";
  return KINDS.find(([, pattern]) => pattern.test(lines[i]))?.[0] ?? "text";
}

const DEEPEST = 8; // quotations within quotations; what is deeper stays text

export function markdown(text, depth = 0) {
  const lines = text.split("\n");
  const blocks = document.createDocumentFragment();
  let i = 0;
  const take = (wanted) => { // the following lines for which `wanted` holds
    const start = i;
    while (i < lines.length && wanted(lines[i], i)) i += 1;
    return lines.slice(start, i);
  };
  while (i < lines.length) {
    const found = kindOf(lines, i);
    const kind = found === "quote" && depth === DEEPEST ? "text" : found;
    const same = (line) => KINDS.find(([name]) => name === kind)[1].test(line);
    const bare = (line) => line.replace(KINDS.find(([name]) => name === kind)[1], "");
    if (!lines[i].trim()) i += 1;
    else if (kind === "code") {
      i += 1;
      blocks.append(codeBlock(take((line) => !line.startsWith("```"))));
      i += 1;
    } else if (kind === "heading") {
      const [, marks, words] = lines[i].match(KINDS[1][1]);
      blocks.append(make(`h${Math.min(6, marks.length + 2)}`, {}, ...inline(words)));
      i += 1;
    } else if (kind === "quote") blocks.append(make("blockquote", {}, markdown(take(same).map(bare).join("\n"), depth + 1)));
    else if (kind === "bullets" || kind === "numbers") {
      const items = take(same).map((line) => make("li", {}, ...inline(bare(line))));
      blocks.append(make(kind === "bullets" ? "ul" : "ol", {}, ...items));
    } else if (kind === "table") blocks.append(table(take((line) => line.includes("|"))));
    else {
      const first = i;
      blocks.append(paragraph(take((line, at) => line.trim() && (at === first || kindOf(lines, at) === "text"))));
    }
  }
  return blocks;
}
