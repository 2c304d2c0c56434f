// A story: pages of a text and its picture, in the order in which they come, to be printed if wanted.

import { parts } from "./api.js";
import { broken, el, filled, working } from "./dom.js";
import { figure, frame, image, offer, Tray, used } from "./pictures.js";

const SIDE = 256;

/** As of chat.js. */
export function start({ model, able, track, go }) {
  const view = document.getElementById("story");
  const form = view.querySelector("form");
  const book = view.querySelector(".book");
  const print = view.querySelector(".print");
  const { prompt } = form.elements;
  const tray = new Tray(form);
  let replaced; // in the history: a story that was broken off, in whose place the next one comes
  form.querySelector(".file").parentElement.hidden = !able.reads;
  tray.thumbs.hidden = !able.reads;
  if (able.reads) {
    offer("Tell a story of it", (picture) => {
      tray.add(picture);
      go();
      prompt.focus();
    });
  }
  print.addEventListener("click", () => window.print());

  const { stop } = working(form, async (signal, notice) => {
    const text = prompt.value.trim();
    if (!text) throw new Error("the prompt is empty: say what the story is about");
    const references = tray.pictures.map(({ url, title }) => ({ url, title }));
    const story = { title: text, references, pages: [], settings: null };
    const asked = [
      ...references.map(({ url }) => ({ type: "image_url", image_url: { url } })),
      { type: "text", text: words(text, references.length) },
    ];
    const body = {
      model,
      messages: [{ role: "user", content: asked }],
      modalities: ["text", "image"],
      ...filled(form, ["max_images", "seed", "temperature"]),
    };
    const shown = new Book(book, story);
    print.hidden = true;
    const entry = () => ({ view: "story", title: text, data: story });
    const running = track(replaced, entry);
    replaced = undefined;
    try {
      for await (const part of parts(body, { signal, notice })) {
        shown.take(part);
        running.changed(Boolean(part.image));
      }
    } finally {
      shown.end();
      print.hidden = !story.pages.length;
      if (story.pages.length) running.finish(entry());
      else {
        book.replaceChildren();
        running.drop();
      }
    }
  });

  return {
    open({ id, data, running }) {
      if (typeof data.title !== "string" || !data.references.every((one) => typeof one.url === "string")) {
        throw new Error("it is no story");
      }
      if (!data.pages.every((page) => typeof page.text === "string")) throw new Error("a page of it is none");
      stop();
      prompt.value = data.title;
      tray.set(data.references);
      const shown = new Book(book, { ...data, pages: [] });
      shown.take({ settings: data.settings });
      for (const { text, url } of data.pages) {
        if (text) shown.take({ text });
        if (url) shown.take({ image: url });
      }
      shown.end();
      print.hidden = false;
      replaced = undefined;
      const again = () => {
        replaced = id;
        form.requestSubmit();
      };
      if (running) book.append(broken("the page was left while this was told.", again));
    },
    focus: () => prompt.focus(),
  };
}

/** The words that ask for a story, as the recipes ask for one, and `unigen story`. */
function words(text, references) {
  const asked = text.toLowerCase().split(/\s+/).includes("story") ? text : `a story about ${text}`;
  if (!references) return asked;
  const these = references === 1 ? "this image" : `these ${references > 2 ? "" : "two "}images`;
  return `follow the identity of ${these}: ${asked}`;
}

/** A story on the page; its pages are { text, url }, and a page ends with its picture. */
class Book {
  constructor(element, story) {
    this.story = story;
    this.element = element;
    this.page = null;
    const references = story.references.map(({ url, title }) => image(url, title, 64));
    element.replaceChildren(el("h2", {}, story.title));
    if (references.length) element.append(el("p", { class: "references" }, ...references));
    element.setAttribute("aria-busy", "true");
  }

  take(part) {
    if (part.settings) this.story.settings = part.settings;
    if (!part.text && !part.image) return;
    if (!this.page) {
      this.story.pages.push({ text: "", url: null });
      this.page = el("section", { class: "page" }, el("p", { class: "words" }, ""), frame(SIDE));
      this.element.append(this.page);
    }
    const page = this.story.pages.at(-1);
    if (part.text) {
      page.text += part.text;
      this.page.firstChild.textContent = page.text;
      return;
    }
    page.url = part.image;
    const { title, settings } = this.story;
    const picture = { url: part.image, title: page.text || title, settings, shown: null };
    this.page.lastChild.replaceWith(figure(picture, SIDE));
    this.page = null;
  }

  end() {
    this.page?.lastChild.remove();
    const { settings } = this.story;
    if (settings) this.element.append(el("p", { class: "used quiet" }, used(settings)));
    this.element.removeAttribute("aria-busy");
  }
}
