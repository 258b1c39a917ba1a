// The settings dialog and the theme. A field that makes no sense keeps its old value.

import { byId } from "./dom.js";
import { key, saveSettings, settings } from "./store.js";

const NUMBERS = { temperature: "temperature", "top-k": "topK", "max-tokens": "maxTokens" };

export function openSettings() {
  for (const [id, name] of Object.entries(NUMBERS)) byId(id).value = settings[name];
  byId("seed").value = settings.seed ?? "";
  byId("system-prompt").value = settings.system;
  byId("api-key").value = key.get();
  byId("settings").showModal();
}

function take() {
  for (const [id, name] of Object.entries(NUMBERS)) {
    const field = byId(id);
    if (field.value !== "" && field.checkValidity()) saveSettings({ [name]: Number(field.value) });
  }
  const seed = byId("seed");
  saveSettings({ seed: seed.value === "" || !seed.checkValidity() ? null : Number(seed.value) });
  saveSettings({ system: byId("system-prompt").value });
  key.set(byId("api-key").value.trim());
}

function theme() {
  if (settings.theme) document.documentElement.dataset.theme = settings.theme;
}

export function startSettings(onChange) {
  theme();
  byId("theme-toggle").addEventListener("click", () => {
    const dark = settings.theme ? settings.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    saveSettings({ theme: dark ? "light" : "dark" });
    theme();
  });
  const dialog = byId("settings");
  byId("settings-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    const before = key.get();
    take();
    if (key.get() !== before) onChange();
    byId("composer").focus();
  });
}
