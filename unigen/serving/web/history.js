// What was asked and answered, in this browser's IndexedDB: at most so many entries and so many characters, the oldest
// forgotten first. An entry is { id, view, title, at, data }; lists are read without the data, which hold pictures.
// One whose answer is still being made, or was when the page was left, has `running`; one that could not be opened has
// `broken`, which says why, and is kept aside until it is forgotten by hand.
// Knows nothing of what the data are.

const MOST_ENTRIES = 100;
const MOST_CHARACTERS = 60e6;
const LARGE = MOST_CHARACTERS / 4; // entries above have a room of their own, so that they take nothing from the others

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

/** A transaction, its stores, and a promise for its end. */
async function stores(mode) {
  const transaction = (await open()).transaction(["list", "data"], mode);
  const end = new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = transaction.onerror = () => reject(transaction.error ?? new Error("the browser refused it"));
  });
  end.catch(() => {}); // whoever waits for it hears of it
  return { lines: transaction.objectStore("list"), contents: transaction.objectStore("data"), end };
}

/** Is there such a thing here? Not in every private window. */
export async function kept() {
  return open().then(() => true, () => false);
}

/** A name for a new entry; crypto's are for pages from https alone. */
export function name() {
  return `${Date.now()}-${Math.random().toString(36).slice(2)}`;
}

/** Keep an entry, in the place of one with the same id. Rejects where the browser has no room for it. */
export async function put(entry) {
  const { data, ...line } = entry;
  const size = JSON.stringify(data).length;
  const { lines, contents, end } = await stores("readwrite");
  lines.put({ ...line, size });
  contents.put(data, line.id);
  const rooms = { small: { count: 0, total: 0 }, large: { count: 0, total: 0 } };
  for (const one of newest(await done(lines.getAll()))) {
    if (one.broken) continue;
    const room = rooms[one.size > LARGE ? "large" : "small"];
    room.total += one.size || 0;
    if (room.count++ && (room.count > MOST_ENTRIES || room.total > MOST_CHARACTERS)) {
      lines.delete(one.id);
      contents.delete(one.id);
    }
  }
  await end;
}

/** All entries, newest first, without their data. */
export async function list() {
  const { lines } = await stores("readonly");
  return newest(await done(lines.getAll()));
}

/** One entry with its data; undefined where there is none. */
export async function entry(id) {
  const { lines, contents } = await stores("readonly");
  const [line, data] = await Promise.all([done(lines.get(id)), done(contents.get(id))]);
  return line && { ...line, data };
}

/** Say why an entry cannot be opened; its data stay as they are. */
export async function putAside(id, broken) {
  const { lines, end } = await stores("readwrite");
  const line = await done(lines.get(id));
  if (line) lines.put({ ...line, broken });
  await end;
}

export async function remove(id) {
  const { lines, contents, end } = await stores("readwrite");
  lines.delete(id);
  contents.delete(id);
  await end;
}

export async function clear() {
  const { lines, contents, end } = await stores("readwrite");
  lines.clear();
  contents.clear();
  await end;
}

function newest(entries) {
  return entries.sort((a, b) => (b.at || 0) - (a.at || 0));
}
