// Elements from plain data. Text goes in as text only: what a model writes can never become markup.

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export const byId = (id) => document.getElementById(id);

export function button(label, testid, onclick, attributes = {}) {
  return make("button", { "data-testid": testid, onclick, ...attributes }, label);
}

export async function copy(text, where) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no permission, or no https: the old way
    const area = make("textarea", { class: "unseen" });
    area.value = text;
    where.after(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const before = where.textContent;
  where.textContent = "Copied";
  setTimeout(() => { where.textContent = before; }, 1200);
}

// Enter, but not the one that ends a word of an input method (Safari says so only by the code 229).
export const isSend = (event) =>
  event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
