// Elements, and forms that run one task at a time. Text is inserted as text, never as markup.
// Does not depend on: views, requests.

/**
 * Create an element.
 * @param {string} tag
 * @param {object} [attributes] functions named `on...` are event listeners, booleans toggle an attribute
 * @param {...(Node | string)} children strings are text
 */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") element.toggleAttribute(name, value);
    else if (value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/**
 * Create a button that submits no form.
 * @param {string} text
 * @param {(event: Event) => void} onClick
 * @param {object} [attributes]
 */
export function button(text, onClick, attributes = {}) {
  return el("button", { type: "button", class: "plain", onclick: onClick, ...attributes }, text);
}

/**
 * Run a task when a form is submitted, one at a time. Enter or the submit button starts it; Escape or the stop button,
 * which takes the place of the submit button, aborts it.
 * @param {HTMLFormElement} form
 * @param {(signal: AbortSignal, notify: (text: string) => void) => Promise<void>} task what it throws is shown in the
 *   form, and the field that the error names is marked
 * @returns {{ stop: () => void }}
 */
export function bindForm(form, task) {
  const [submitButton, stopButton] = [form.querySelector(".submit"), form.querySelector(".stop")];
  let controller = null;

  const showRunning = (isRunning) => {
    const hadFocus = document.activeElement === (isRunning ? submitButton : stopButton);
    [submitButton.hidden, stopButton.hidden] = [isRunning, !isRunning];
    if (hadFocus) (isRunning ? stopButton : submitButton).focus();
  };
  const notify = (text) => {
    const line = form.querySelector(".status");
    [line.textContent, line.hidden] = [text, !text];
  };

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (controller) return;
    clearError(form);
    controller = new AbortController();
    showRunning(true);
    try {
      await task(controller.signal, notify);
    } catch (error) {
      if (error.name !== "AbortError") showError(form, error);
    } finally {
      controller = null;
      notify("");
      showRunning(false);
    }
  });
  form.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.target.tagName !== "TEXTAREA") return;
    event.preventDefault();
    form.requestSubmit(submitButton);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]") && form.checkVisibility()) controller?.abort();
  });
  stopButton.addEventListener("click", () => controller?.abort());
  for (const textarea of form.querySelectorAll("textarea")) textarea.addEventListener("input", () => autosize(textarea));
  return { stop: () => controller?.abort() };
}

/**
 * A note that an answer was interrupted, with a button that requests it again.
 * @param {string} text why
 * @param {() => void} retry
 */
export function interruptedNote(text, retry) {
  return el("p", { class: "interrupted muted" }, `Interrupted: ${text} `, button("Ask again", retry));
}

/**
 * Make a text area as high as its text.
 * @param {HTMLTextAreaElement} textarea
 */
export function autosize(textarea) {
  textarea.style.height = "auto";
  if (textarea.scrollHeight) textarea.style.height = `${textarea.scrollHeight + 2}px`;
}

/**
 * Show an error in a form, and mark the field that it names by its `param` or in its message.
 * @param {HTMLFormElement} form
 * @param {Error & { param?: string }} error
 */
export function showError(form, error) {
  const line = form.querySelector(".error");
  [line.textContent, line.hidden] = [error.message, false];
  line.scrollIntoView({ block: "nearest" });
  const names = error.param ? error.param.split(".") : error.message.split(/[^\w-]+/);
  const isNamed = (element) => element.name && element.checkVisibility() && names.includes(element.name);
  const field = [...form.elements].find(isNamed);
  if (!field) return;
  field.setAttribute("aria-invalid", "true");
  field.focus({ preventScroll: true });
}

function clearError(form) {
  form.querySelector(".error").hidden = true;
  for (const field of form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

/**
 * The filled-in values of these fields. Numbers are numbers; a text in a field for numbers stays as it is, so that the
 * server names it in its error.
 * @param {HTMLFormElement} form
 * @param {string[]} names
 * @returns {Object<string, string | number>}
 */
export function formValues(form, names) {
  const values = {};
  for (const name of names) {
    const field = form.elements[name];
    const text = field.value.trim();
    if (!text || field.closest("[hidden]")) continue;
    values[name] = field.inputMode && Number.isFinite(Number(text)) ? Number(text) : text;
  }
  return values;
}
