// What was asked and answered, in this browser's IndexedDB: at most so many entries and so many characters, the oldest
// forgotten first. An entry is { id, view, title, at, data }; lists are read without the data, which hold pictures.
// Knows nothing of what the data are.

const MOST_ENTRIES = 100;
const MOST_CHARACTERS = 60e6;

let opened;

function open() {
  opened ??= new Promise((resolve, reject) => {
    const asked = indexedDB.open("unigen", 1);
    asked.onupgradeneeded = () => {
      asked.result.createObjectStore("list", { keyPath: "id" });
      asked.result.createObjectStore("data");
    };
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
  return opened;
}

function done(asked) {
  return new Promise((resolve, reject) => {
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
}

async function stores(mode) {
  const transaction = (await open()).transaction(["list", "data"], mode);
  return [transaction.objectStore("list"), transaction.objectStore("data")];
}

/** Is there such a thing here? Not in every private window. */
export async function kept() {
  return open().then(() => true, () => false);
}

/** A name for a new entry; crypto's are for pages from https alone. */
export function name() {
  return `${Date.now()}-${Math.random().toString(36).slice(2)}`;
}

/** Keep an entry, in the place of one with the same id. */
export async function put(entry) {
  const { data, ...line } = entry;
  const size = JSON.stringify(data).length;
  const [lines, contents] = await stores("readwrite");
  lines.put({ ...line, size });
  contents.put(data, line.id);
  let total = 0;
  for (const [i, one] of newest(await done(lines.getAll())).entries()) {
    total += one.size;
    if (i && (i >= MOST_ENTRIES || total > MOST_CHARACTERS)) {
      lines.delete(one.id);
      contents.delete(one.id);
    }
  }
}

/** All entries, newest first, without their data. */
export async function list() {
  const [lines] = await stores("readonly");
  return newest(await done(lines.getAll()));
}

/** What an entry holds. */
export async function data(id) {
  const [, contents] = await stores("readonly");
  return done(contents.get(id));
}

export async function remove(id) {
  for (const store of await stores("readwrite")) store.delete(id);
}

export async function clear() {
  for (const store of await stores("readwrite")) store.clear();
}

function newest(entries) {
  return entries.sort((a, b) => b.at - a.at);
}
