// Stores an answer with its request while it is generated, so that neither is lost when the page is left or reloaded.
// Does not depend on: the contents of the entries.

import * as history from "./history.js";

const RUNNING_ITEM = "unigen.running"; // in the session storage of the tab: id of the entry that is being generated
const WRITE_INTERVAL = 500; // milliseconds
const LEAVE_EVENTS = ["beforeunload", "pagehide"];

// Leaving the page breaks its requests off, which is not the end of an answer.
let isLeaving = false;
window.addEventListener("beforeunload", () => {
  isLeaving = true;
  setTimeout(() => (isLeaving = false), 5000); // the user stayed
});
window.addEventListener("pagehide", () => (isLeaving = true));
window.addEventListener("pageshow", () => (isLeaving = false));

/**
 * @typedef {object} TrackedEntry
 * @property {(now?: boolean) => void} changed the entry has changed; it is written at once or within WRITE_INTERVAL
 * @property {(entry: object) => string} finish writes the finished entry, and returns its id
 * @property {() => void} discard restores what was stored before
 */

/**
 * Return the function track(id, getEntry), which stores an entry while it is generated.
 *   id: of the entry that is replaced or continued; undefined for a new one
 *   getEntry: returns the entry as it is now
 * @param {(text: string) => void} notify tells the user what could not be stored
 * @returns {(id: string | undefined, getEntry: () => object) => TrackedEntry}
 */
export function createTracker(notify) {
  const put = (entry) =>
    history
      .put({ at: Date.now(), ...entry })
      .catch((error) => notify(`This could not be kept in the history: ${error.message}.`));

  return function track(id, getEntry) {
    const entryId = id ?? history.newId();
    const previous = id ? history.get(id).catch(() => undefined) : Promise.resolve(undefined);
    let timer = null;
    let writing = previous;
    const write = () => {
      timer = null;
      const entry = structuredClone({ ...getEntry(), id: entryId, running: true });
      writing = writing.then(() => put(entry));
    };
    const flush = () => timer && (clearTimeout(timer), write());
    const changed = (now) => {
      timer ??= setTimeout(write, WRITE_INTERVAL);
      if (now) flush();
    };
    /** Stop tracking; false where the page is being left, and the entry stays as it is. */
    const stop = () => {
      if (isLeaving) return false;
      clearTimeout(timer);
      for (const name of LEAVE_EVENTS) window.removeEventListener(name, flush);
      if (sessionStorage.getItem(RUNNING_ITEM) === entryId) sessionStorage.removeItem(RUNNING_ITEM); // else a later one's
      return true;
    };
    sessionStorage.setItem(RUNNING_ITEM, entryId);
    for (const name of LEAVE_EVENTS) window.addEventListener(name, flush);
    write();
    return {
      changed,
      finish: (entry) => {
        if (stop()) writing.then(() => put({ ...entry, id: entryId }));
        return entryId;
      },
      discard: () => {
        if (!stop()) return;
        writing.then(async () => {
          const entry = await previous;
          await (entry ? put(entry) : history.remove(entryId));
        });
      },
    };
  };
}

/**
 * The id of the entry that was being generated when this tab was reloaded; null at a second call.
 * @returns {string | null}
 */
export function takeInterruptedId() {
  const id = sessionStorage.getItem(RUNNING_ITEM);
  sessionStorage.removeItem(RUNNING_ITEM);
  return id;
}
