// The chat: text and pictures in and out, as they come. What was said goes with each message, pictures included.

import { parts } from "./api.js";
import { broken, button, el, filled, fit, working } from "./dom.js";
import { figure, image, offer, Tray, used } from "./pictures.js";

const SIDE = 256;
const NAMES = { interleaved: "Text and pictures", text: "Text", image: "Picture" };
const MODALITIES = { interleaved: null, text: ["text"], image: ["image"] }; // null: a question is answered in text
const EXAMPLES = [
  ["two apples on a blue background", "image"],
  ["a story about a witch and her raven", "interleaved"],
  ["a red dog left of a house", "image"],
];

/** able: what the model can; track: of keeping.js; go(): show this view. Opens what was kept. */
export function start({ model, able, track, go }) {
  const view = document.getElementById("chat");
  const form = view.querySelector("form");
  const log = view.querySelector(".log");
  const { prompt, output } = form.elements;
  const tray = new Tray(form);
  let turns = []; // { role, parts: [{ text } or { image, title, settings }], settings, reason }
  let id; // in the history, once there is an answer
  let pinned = true; // to the end of what was said, until the reader scrolls away from it

  window.addEventListener("scroll", () => {
    const { scrollHeight, clientHeight, scrollTop } = document.documentElement;
    if (view.checkVisibility()) pinned = scrollHeight - clientHeight - scrollTop < 80;
  });
  new ResizeObserver(() => {
    if (pinned && view.checkVisibility()) window.scrollTo(0, document.documentElement.scrollHeight);
  }).observe(log);

  const outputs = Object.keys(NAMES).filter((name) => able.outputs.includes(name));
  output.append(...outputs.map((name) => el("option", { value: name }, NAMES[name])));
  output.hidden = outputs.length < 2;
  form.querySelector(".file").parentElement.hidden = !able.reads;
  const examples = EXAMPLES.filter(([, kind]) => able.outputs.includes(kind));
  view.querySelector(".welcome").hidden = !examples.length;
  view.querySelector(".examples").append(
    ...examples.map(([text]) => el("li", {}, button(text, () => ((prompt.value = text), form.requestSubmit())))),
  );
  if (able.reads) {
    offer("Ask about it", (picture) => {
      tray.add(picture);
      go();
      prompt.focus();
    });
  }

  const { stop } = working(form, async (signal, notice) => {
    const text = prompt.value.trim();
    const given = tray.pictures.map(({ url, title }) => ({ image: url, title }));
    if (!text && !given.length) throw new Error("the prompt is empty: say what to draw or ask");
    const mine = { role: "user", parts: [...given, ...(text ? [{ text }] : [])] };
    const answer = { role: "assistant", parts: [], settings: null, reason: null };
    const chat = turns;
    const body = {
      model,
      messages: [...chat, mine].filter((turn) => turn.parts.length).map(message),
      modalities: MODALITIES[output.value],
      ...filled(form, ["seed", "temperature", "max_tokens"]),
    };
    const shown = [turnOf(mine), turnOf(answer)];
    shown[1].setAttribute("aria-busy", "true");
    log.append(...shown);
    const pictures = tray.take();
    prompt.value = "";
    fit(prompt);
    pinned = true;
    const entry = () => ({ view: "chat", title: titleOf([...chat, mine]), data: [...chat, mine, answer] });
    const running = track(id, entry);
    try {
      for await (const part of parts(body, { signal, notice })) {
        take(answer, part, text, shown[1]);
        running.changed(Boolean(part.image));
      }
      if (answer.reason === "length") shown[1].append(note("It was cut where it had its most tokens or pictures."));
    } catch (error) {
      if (error.name === "AbortError") shown[1].append(note("Stopped."));
      if (chat === turns && !answer.parts.length) {
        for (const one of shown) one.remove();
        prompt.value ||= text;
        fit(prompt);
        tray.set([...pictures, ...tray.pictures]);
      }
      throw error;
    } finally {
      shown[1].removeAttribute("aria-busy");
      if (!answer.parts.length) running.drop();
      else {
        const own = running.finish(entry());
        if (chat === turns) {
          turns.push(mine, answer);
          sign(shown[1], answer);
          id = own;
        }
      }
    }
  });

  /** One more part of an answer: into what is kept, and onto the page. */
  function take(answer, part, title, shown) {
    if (part.settings) answer.settings = part.settings;
    if (part.reason) answer.reason = part.reason;
    if (part.text) {
      const last = answer.parts.at(-1);
      if (last?.text) {
        last.text += part.text;
        shown.querySelector("p.words:last-of-type").firstChild.appendData(part.text);
      } else {
        answer.parts.push({ text: part.text });
        shown.append(el("p", { class: "words" }, part.text));
      }
    }
    if (part.image) {
      const made = { image: part.image, title, settings: answer.settings };
      answer.parts.push(made);
      shown.append(drawn(made));
    }
  }

  function turnOf({ role, parts }) {
    const name = role === "user" ? "You" : model;
    const made = el("article", { class: `turn ${role}`, "aria-label": name });
    for (const part of parts) {
      if (part.text) made.append(el("p", { class: "words" }, part.text));
      else if (role === "user") made.append(image(part.image, part.title, 128));
      else made.append(drawn(part));
    }
    return made;
  }

  function begin(kept = [], as = undefined, interrupted = false) {
    stop();
    [turns, id] = [kept, as];
    log.replaceChildren(...turns.map(turnOf));
    for (const [i, turn] of turns.entries()) {
      if (turn.settings) sign(log.children[i], turn);
    }
    if (interrupted) log.lastElementChild.append(broken("the page was left while this was answered.", again));
  }

  /** Ask the last question once more, in the place of its broken answer. */
  function again() {
    const [asked] = turns.splice(-2);
    for (let i = 0; i < 2; i++) log.lastElementChild.remove();
    tray.set(asked.parts.filter((part) => part.image).map(({ image: url, title }) => ({ url, title })));
    prompt.value = asked.parts.find((part) => part.text)?.text ?? "";
    form.requestSubmit();
  }

  view.querySelector(".new").addEventListener("click", () => {
    begin();
    prompt.focus();
  });
  return {
    open({ id: own, data, running }) {
      const whole = (part) => typeof part.text === "string" || typeof part.image === "string";
      if (!data.length || !data.every(({ role, parts }) => role && parts.every(whole))) throw new Error("it is no chat");
      begin(data, own, running);
    },
    focus: () => prompt.focus(),
  };
}

/** A picture of an answer, which says at its end how it was made. */
function drawn({ image: url, title, settings }) {
  return figure({ url, title, settings, shown: null }, SIDE);
}

/** How an answer was made, at its end. */
function sign(shown, { settings, parts }) {
  const drawn = parts.some((part) => part.image);
  if (settings) shown.append(el("p", { class: "used quiet" }, used(settings, drawn)));
}

function message({ role, parts }) {
  const content = parts.map((part) =>
    part.text ? { type: "text", text: part.text } : { type: "image_url", image_url: { url: part.image } },
  );
  return { role, content };
}

function titleOf(turns) {
  return turns[0].parts.find((part) => part.text)?.text ?? "a picture";
}

function note(text) {
  return el("p", { class: "quiet" }, text);
}
