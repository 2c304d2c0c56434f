// Elements, and forms that do one thing at a time. Text gets onto the page as text alone, never as markup.
// Knows no view and no request.

/** An element. What is named `on...` listens, all else are attributes; strings among the children are text. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") made.toggleAttribute(name, value);
    else if (value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** A button that is no form's. */
export function button(text, act, attributes = {}) {
  return el("button", { type: "button", class: "plain", onclick: act, ...attributes }, text);
}

/**
 * Let a form do its work: Enter or its button starts it, Escape or the button that takes its place stops it.
 * work(signal, notice): what is thrown is said in one line, and the field marked that it names.
 */
export function working(form, work) {
  const [go, stop] = [form.querySelector(".go"), form.querySelector(".stop")];
  let running = null;

  const shown = (on) => {
    const moved = document.activeElement === (on ? go : stop);
    [go.hidden, stop.hidden] = [on, !on];
    if (moved) (on ? stop : go).focus();
  };
  const notice = (text) => {
    const line = form.querySelector(".said");
    [line.textContent, line.hidden] = [text, !text];
  };

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) return;
    unmark(form);
    running = new AbortController();
    shown(true);
    try {
      await work(running.signal, notice);
    } catch (error) {
      if (error.name !== "AbortError") mark(form, error);
    } finally {
      running = null;
      notice("");
      shown(false);
    }
  });
  form.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.target.tagName !== "TEXTAREA") return;
    event.preventDefault();
    form.requestSubmit(go);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]") && form.checkVisibility()) running?.abort();
  });
  stop.addEventListener("click", () => running?.abort());
  for (const area of form.querySelectorAll("textarea")) area.addEventListener("input", () => fit(area));
  return { stop: () => running?.abort() };
}

/** Says that an answer was broken off, with a button that asks for it again. */
export function broken(text, again) {
  return el("p", { class: "broken quiet" }, `Interrupted: ${text} `, button("Ask again", again));
}

/** As high as what stands in it. */
export function fit(area) {
  area.style.height = "auto";
  if (area.scrollHeight) area.style.height = `${area.scrollHeight + 2}px`;
}

/** Say what is wrong, and mark the field that the error names by its parameter, or in its words. */
export function mark(form, error) {
  const line = form.querySelector(".error");
  [line.textContent, line.hidden] = [error.message, false];
  line.scrollIntoView({ block: "nearest" });
  const words = error.param ? error.param.split(".") : error.message.split(/[^\w-]+/);
  const field = [...form.elements].find((one) => one.name && one.checkVisibility() && words.includes(one.name));
  if (!field) return;
  field.setAttribute("aria-invalid", "true");
  field.focus({ preventScroll: true });
}

export function unmark(form) {
  form.querySelector(".error").hidden = true;
  for (const field of form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

/** What was filled in of these fields, numbers as numbers; what is none goes as it stands, for the server to refuse. */
export function filled(form, names) {
  const given = {};
  for (const name of names) {
    const field = form.elements[name];
    const text = field.value.trim();
    if (!text || field.closest("[hidden]")) continue;
    given[name] = field.inputMode && Number.isFinite(Number(text)) ? Number(text) : text;
  }
  return given;
}
