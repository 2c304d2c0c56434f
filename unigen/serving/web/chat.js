// The chat view: texts and images in and out. Every request contains the whole conversation, with its images.

import { streamParts } from "./api.js";
import { autosize, bindForm, button, el, formValues, interruptedNote } from "./dom.js";
import { addImageAction, figureElement, imageElement, ImageTray, settingsText } from "./images.js";

const IMAGE_SIZE = 256; // CSS pixels
const INPUT_IMAGE_SIZE = 128;
const BOTTOM_DISTANCE = 80; // CSS pixels from the end within which the page follows an answer
const OUTPUT_LABELS = { interleaved: "Text and images", text: "Text", image: "Image" };
const MODALITIES = { interleaved: null, text: ["text"], image: ["image"] }; // null: the model answers questions in text
const EXAMPLES = [
  ["two apples on a blue background", "image"],
  ["a story about a witch and her raven", "interleaved"],
  ["a red dog left of a house", "image"],
];

/**
 * Start the view.
 * @param {object} options
 * @param {string} options.model name of the model in requests
 * @param {object} options.capabilities as of page.js
 * @param {Function} options.track as of storage.js
 * @param {() => void} options.activate shows this view
 * @returns {{ open: (entry: object) => void, focus: () => void }} open: shows an entry of the history
 */
export function start({ model, capabilities, track, activate }) {
  const view = document.getElementById("chat");
  const form = view.querySelector("form");
  const log = view.querySelector(".log");
  const { prompt, output } = form.elements;
  const tray = new ImageTray(form);
  let turns = []; // { role, parts: [{ text } or { image, title, settings }], settings, reason }
  let entryId; // in the history, once there is an answer

  followAnswers(view, log);
  setUpForm();

  const { stop } = bindForm(form, async (signal, notify) => {
    const text = prompt.value.trim();
    const images = tray.images.map(({ url, title }) => ({ image: url, title }));
    if (!text && !images.length) throw new Error("the prompt is empty: say what to draw or ask");
    const userTurn = { role: "user", parts: [...images, ...(text ? [{ text }] : [])] };
    const answer = { role: "assistant", parts: [], settings: null, reason: null };
    const previousTurns = turns;
    const messages = [...previousTurns, userTurn].filter((turn) => turn.parts.length).map(toMessage);
    const options = formValues(form, ["seed", "temperature", "max_tokens"]);
    const body = { model, messages, modalities: MODALITIES[output.value], ...options };
    const [userElement, answerElement] = [turnElement(userTurn), turnElement(answer)];
    answerElement.setAttribute("aria-busy", "true");
    log.append(userElement, answerElement);
    const trayImages = tray.takeAll();
    setPrompt("");
    log.dispatchEvent(new CustomEvent("follow"));
    const getEntry = () => {
      const data = [...previousTurns, userTurn, answer];
      return { view: "chat", title: titleOf(data), data };
    };
    const tracked = track(entryId, getEntry);
    try {
      for await (const part of streamParts(body, { signal, notify })) {
        appendPart(answer, part, text, answerElement);
        tracked.changed(Boolean(part.image));
      }
      if (answer.reason === "length") {
        answerElement.append(note("The answer was cut at its maximum number of tokens or images."));
      }
    } catch (error) {
      if (error.name === "AbortError") answerElement.append(note("Stopped."));
      if (previousTurns === turns && !answer.parts.length) {
        userElement.remove();
        answerElement.remove();
        setPrompt(prompt.value || text);
        tray.set([...trayImages, ...tray.images]);
      }
      throw error;
    } finally {
      answerElement.removeAttribute("aria-busy");
      if (!answer.parts.length) tracked.discard();
      else {
        const finishedId = tracked.finish(getEntry());
        if (previousTurns === turns) {
          turns.push(userTurn, answer);
          addSettings(answerElement, answer);
          entryId = finishedId;
        }
      }
    }
  });

  /** Offer what the model can answer with. */
  function setUpForm() {
    const outputs = Object.keys(OUTPUT_LABELS).filter((name) => capabilities.outputs.includes(name));
    output.append(...outputs.map((name) => el("option", { value: name }, OUTPUT_LABELS[name])));
    output.hidden = outputs.length < 2;
    form.querySelector(".file").parentElement.hidden = !capabilities.readsImages;
    const examples = EXAMPLES.filter(([, kind]) => capabilities.outputs.includes(kind));
    view.querySelector(".welcome").hidden = !examples.length;
    const sendExample = (text) => {
      prompt.value = text;
      form.requestSubmit();
    };
    view
      .querySelector(".examples")
      .append(...examples.map(([text]) => el("li", {}, button(text, () => sendExample(text)))));
    if (!capabilities.readsImages) return;
    addImageAction("Ask about it", (image) => {
      tray.add(image);
      activate();
      prompt.focus();
    });
  }

  function setPrompt(text) {
    prompt.value = text;
    autosize(prompt);
  }

  /** Add a streamed part to an answer and to its element. */
  function appendPart(answer, part, title, element) {
    if (part.settings) answer.settings = part.settings;
    if (part.reason) answer.reason = part.reason;
    if (part.text) {
      const last = answer.parts.at(-1);
      if (last?.text) {
        last.text += part.text;
        element.querySelector("p.text:last-of-type").firstChild.appendData(part.text);
      } else {
        answer.parts.push({ text: part.text });
        element.append(el("p", { class: "text" }, part.text));
      }
    }
    if (part.image) {
      const imagePart = { image: part.image, title, settings: answer.settings };
      answer.parts.push(imagePart);
      element.append(answerFigure(imagePart));
    }
  }

  function turnElement({ role, parts }) {
    const name = role === "user" ? "You" : model;
    const element = el("article", { class: `turn ${role}`, "aria-label": name });
    for (const part of parts) {
      if (part.text) element.append(el("p", { class: "text" }, part.text));
      else if (role === "user") element.append(imageElement(part.image, part.title, INPUT_IMAGE_SIZE));
      else element.append(answerFigure(part));
    }
    return element;
  }

  /** Show a conversation: an entry of the history, or an empty one. */
  function show(newTurns = [], id = undefined, wasInterrupted = false) {
    stop();
    [turns, entryId] = [newTurns, id];
    log.replaceChildren(...turns.map(turnElement));
    for (const [i, turn] of turns.entries()) {
      if (turn.settings) addSettings(log.children[i], turn);
    }
    if (wasInterrupted) {
      log.lastElementChild.append(interruptedNote("the page was left while this was answered.", retry));
    }
  }

  /** Ask the last question again, in the place of its interrupted answer. */
  function retry() {
    const [question] = turns.splice(-2);
    for (let i = 0; i < 2; i++) log.lastElementChild.remove();
    tray.set(question.parts.filter((part) => part.image).map(({ image: url, title }) => ({ url, title })));
    prompt.value = question.parts.find((part) => part.text)?.text ?? "";
    form.requestSubmit();
  }

  view.querySelector(".new-chat").addEventListener("click", () => {
    show();
    prompt.focus();
  });
  return {
    open({ id, data, running }) {
      const isPart = (part) => typeof part.text === "string" || typeof part.image === "string";
      if (!data.length || !data.every(({ role, parts }) => role && parts.every(isPart))) throw new Error("it is no chat");
      show(data, id, running);
    },
    focus: () => prompt.focus(),
  };
}

/** Keep the end of the log in view while it grows, until the user scrolls away; the event "follow" starts again. */
function followAnswers(view, log) {
  let isAtEnd = true;
  window.addEventListener("scroll", () => {
    const { scrollHeight, clientHeight, scrollTop } = document.documentElement;
    if (view.checkVisibility()) isAtEnd = scrollHeight - clientHeight - scrollTop < BOTTOM_DISTANCE;
  });
  log.addEventListener("follow", () => (isAtEnd = true));
  new ResizeObserver(() => {
    if (isAtEnd && view.checkVisibility()) window.scrollTo(0, document.documentElement.scrollHeight);
  }).observe(log);
}

/** An image of an answer; the settings stand at the end of the answer. */
function answerFigure({ image: url, title, settings }) {
  return figureElement({ url, title, settings }, IMAGE_SIZE, null);
}

/** Show at the end of an answer how it was generated. */
function addSettings(element, { settings, parts }) {
  const hasImages = parts.some((part) => part.image);
  if (settings) element.append(el("p", { class: "settings muted" }, settingsText(settings, hasImages)));
}

/** A turn as a message of /v1/chat/completions. */
function toMessage({ role, parts }) {
  const content = parts.map((part) =>
    part.text ? { type: "text", text: part.text } : { type: "image_url", image_url: { url: part.image } },
  );
  return { role, content };
}

function titleOf(turns) {
  return turns[0].parts.find((part) => part.text)?.text ?? "a picture";
}

function note(text) {
  return el("p", { class: "muted" }, text);
}
