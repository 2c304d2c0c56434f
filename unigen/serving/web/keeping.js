// An answer on its way is kept as it comes, with what was asked, so that a page that is left or loaded anew loses neither.
// Knows the history and the tab's storage; does not depend on what is kept.

import * as past from "./history.js";

const RUNNING = "unigen.inference.scheduler"; // in this tab: the entry whose answer is being made
const PAUSE = 500; // milliseconds between two times that it is written

const LEAVES = ["beforeunload", "pagehide"];

// When the page is left its requests break off, which is no end of an answer.
let leaving = false;
window.addEventListener("beforeunload", () => {
  leaving = true;
  setTimeout(() => (leaving = false), 5000); // the reader stayed
});
window.addEventListener("pagehide", () => (leaving = true));
window.addEventListener("pageshow", () => (leaving = false));

/** How answers are kept while they are made. say(text): tells the reader what could not be kept. */
export function tracker(say) {
  const put = (entry) =>
    past.put({ at: Date.now(), ...entry }).catch((error) => say(`This could not be kept in the history: ${error.message}.`));

  /**
   * Keep what entry() gives from now on, until finish(entry), which keeps that instead and returns its id, or drop(),
   * which keeps what was there before. changed(now): it gives something else, which is kept at once, or within PAUSE.
   */
  return function track(id, entry) {
    const own = id ?? past.name();
    const before = id ? past.entry(id).catch(() => undefined) : Promise.resolve(undefined);
    let timer = null;
    let writing = before;
    const write = () => {
      timer = null;
      const now = structuredClone({ ...entry(), id: own, running: true });
      writing = writing.then(() => put(now));
    };
    const left = () => timer && (clearTimeout(timer), write());
    const changed = (now) => {
      timer ??= setTimeout(write, PAUSE);
      if (now) left();
    };
    const stop = () => {
      if (leaving) return false;
      clearTimeout(timer);
      for (const name of LEAVES) window.removeEventListener(name, left);
      if (sessionStorage.getItem(RUNNING) === own) sessionStorage.removeItem(RUNNING); // it may name a later answer
      return true;
    };
    sessionStorage.setItem(RUNNING, own);
    for (const name of LEAVES) window.addEventListener(name, left);
    write();
    return {
      changed,
      finish: (whole) => {
        if (stop()) writing.then(() => put({ ...whole, id: own }));
        return own;
      },
      drop: () => {
        if (!stop()) return;
        writing.then(async () => {
          const old = await before;
          await (old ? put(old) : past.remove(own));
        });
      },
    };
  };
}

/** The entry whose answer was being made when this tab was loaded anew, once. */
export function interrupted() {
  const id = sessionStorage.getItem(RUNNING);
  sessionStorage.removeItem(RUNNING);
  return id;
}
