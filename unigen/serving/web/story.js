// The story view: pages of a text and its image, in order; they can be printed.

import { streamParts } from "./api.js";
import { bindForm, el, formValues, interruptedNote } from "./dom.js";
import { addImageAction, figureElement, imageElement, ImageTray, placeholder, settingsText } from "./images.js";

const IMAGE_SIZE = 256; // CSS pixels
const REFERENCE_SIZE = 64;

/** Start the view; parameters and result as in chat.js. */
export function start({ model, capabilities, track, activate }) {
  const view = document.getElementById("story");
  const form = view.querySelector("form");
  const bookElement = view.querySelector(".book");
  const printButton = view.querySelector(".print");
  const { prompt } = form.elements;
  const tray = new ImageTray(form);
  let replacedId; // in the history: the interrupted story that the next one replaces
  form.querySelector(".file").parentElement.hidden = !capabilities.readsImages;
  tray.thumbnails.hidden = !capabilities.readsImages;
  if (capabilities.readsImages) {
    addImageAction("Tell a story about it", (image) => {
      tray.add(image);
      activate();
      prompt.focus();
    });
  }
  printButton.addEventListener("click", () => window.print());

  const { stop } = bindForm(form, async (signal, notify) => {
    const text = prompt.value.trim();
    if (!text) throw new Error("the prompt is empty: say what the story is about");
    const references = tray.images.map(({ url, title }) => ({ url, title }));
    const story = { title: text, references, pages: [], settings: null };
    const content = [
      ...references.map(({ url }) => ({ type: "image_url", image_url: { url } })),
      { type: "text", text: storyPrompt(text, references.length) },
    ];
    const body = {
      model,
      messages: [{ role: "user", content }],
      modalities: ["text", "image"],
      ...formValues(form, ["max_images", "seed", "temperature"]),
    };
    const book = new Book(bookElement, story);
    printButton.hidden = true;
    const getEntry = () => ({ view: "story", title: text, data: story });
    const tracked = track(replacedId, getEntry);
    replacedId = undefined;
    try {
      for await (const part of streamParts(body, { signal, notify })) {
        book.addPart(part);
        tracked.changed(Boolean(part.image));
      }
    } finally {
      book.finish();
      printButton.hidden = !story.pages.length;
      if (story.pages.length) tracked.finish(getEntry());
      else {
        bookElement.replaceChildren();
        tracked.discard();
      }
    }
  });

  return {
    open({ id, data, running }) {
      if (typeof data.title !== "string" || !data.references.every(({ url }) => typeof url === "string")) {
        throw new Error("it is no story");
      }
      if (!data.pages.every((page) => typeof page.text === "string")) throw new Error("a page of it is none");
      stop();
      prompt.value = data.title;
      tray.set(data.references);
      const book = new Book(bookElement, { ...data, pages: [] });
      book.addPart({ settings: data.settings });
      for (const { text, url } of data.pages) {
        if (text) book.addPart({ text });
        if (url) book.addPart({ image: url });
      }
      book.finish();
      printButton.hidden = false;
      replacedId = undefined;
      const retry = () => {
        replacedId = id;
        form.requestSubmit();
      };
      if (running) bookElement.append(interruptedNote("the page was left while this was told.", retry));
    },
    focus: () => prompt.focus(),
  };
}

/** The prompt for a story, worded as in the training data and in `unigen story`. */
function storyPrompt(text, numReferences) {
  const request = text.toLowerCase().split(/\s+/).includes("story") ? text : `a story about ${text}`;
  if (!numReferences) return request;
  const images = numReferences === 1 ? "this image" : `these ${numReferences > 2 ? "" : "two "}images`;
  return `follow the identity of ${images}: ${request}`;
}

/** A story on the page. Its pages are { text, url }; an image completes a page. */
class Book {
  constructor(element, story) {
    this.story = story;
    this.element = element;
    this.pageElement = null; // of the page that has no image yet
    const references = story.references.map(({ url, title }) => imageElement(url, title, REFERENCE_SIZE));
    element.replaceChildren(el("h2", {}, story.title));
    if (references.length) element.append(el("p", { class: "references" }, ...references));
    element.setAttribute("aria-busy", "true");
  }

  /** Add a part of `streamParts` to the story and to the page. */
  addPart(part) {
    if (part.settings) this.story.settings = part.settings;
    if (!part.text && !part.image) return;
    if (!this.pageElement) {
      this.story.pages.push({ text: "", url: null });
      this.pageElement = el("section", { class: "page" }, el("p", { class: "text" }, ""), placeholder(IMAGE_SIZE));
      this.element.append(this.pageElement);
    }
    const page = this.story.pages.at(-1);
    if (part.text) {
      page.text += part.text;
      this.pageElement.firstChild.textContent = page.text;
      return;
    }
    page.url = part.image;
    const { title, settings } = this.story;
    const image = { url: part.image, title: page.text || title, settings };
    this.pageElement.lastChild.replaceWith(figureElement(image, IMAGE_SIZE, null));
    this.pageElement = null;
  }

  finish() {
    this.pageElement?.lastChild.remove();
    const { settings } = this.story;
    if (settings) this.element.append(el("p", { class: "settings muted" }, settingsText(settings)));
    this.element.removeAttribute("aria-busy");
  }
}
