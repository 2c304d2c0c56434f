// The history of requests and answers, in this browser's IndexedDB. The oldest entries are deleted first.
//
// An entry is { id, view, title, at, data }. It also has
//   running: true, while its answer is being generated, and where the page was left meanwhile;
//   broken: why it could not be opened. Such an entry is kept until the user deletes it.
// A list of entries comes without the data, which contain images.
// Does not depend on: the contents of the data.

const MAX_ENTRIES = 100;
const MAX_CHARACTERS = 60e6;
const LARGE_ENTRY = MAX_CHARACTERS / 4; // larger entries have a quota of their own, so that they displace no others

let database;

function openDatabase() {
  database ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("unigen", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("list", { keyPath: "id" });
      request.result.createObjectStore("data");
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return database;
}

function requestResult(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** Begin a transaction: its stores of headers (entries without data) and of data, and a promise for its end. */
async function beginTransaction(mode) {
  const transaction = (await openDatabase()).transaction(["list", "data"], mode);
  const completed = new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = transaction.onerror = () => reject(transaction.error ?? new Error("the browser refused it"));
  });
  completed.catch(() => {}); // the caller that awaits it handles the error
  return { headers: transaction.objectStore("list"), contents: transaction.objectStore("data"), completed };
}

/**
 * Is there a history? Some private windows have no IndexedDB.
 * @returns {Promise<boolean>}
 */
export async function isAvailable() {
  return openDatabase().then(() => true, () => false);
}

/** An id for a new entry; crypto.randomUUID exists on https pages only. */
export function newId() {
  return `${Date.now()}-${Math.random().toString(36).slice(2)}`;
}

/**
 * Store an entry, in the place of one with the same id. Rejects where the browser has no space for it.
 * @param {object} entry
 */
export async function put(entry) {
  const { data, ...header } = entry;
  const size = JSON.stringify(data).length;
  const { headers, contents, completed } = await beginTransaction("readwrite");
  headers.put({ ...header, size });
  contents.put(data, header.id);
  const quotas = { small: { count: 0, size: 0 }, large: { count: 0, size: 0 } };
  for (const stored of newestFirst(await requestResult(headers.getAll()))) {
    if (stored.broken) continue;
    const quota = quotas[stored.size > LARGE_ENTRY ? "large" : "small"];
    quota.size += stored.size || 0;
    quota.count += 1;
    if (quota.count > 1 && (quota.count > MAX_ENTRIES || quota.size > MAX_CHARACTERS)) {
      headers.delete(stored.id);
      contents.delete(stored.id);
    }
  }
  await completed;
}

/**
 * All entries, newest first, without their data.
 * @returns {Promise<object[]>}
 */
export async function list() {
  const { headers } = await beginTransaction("readonly");
  return newestFirst(await requestResult(headers.getAll()));
}

/**
 * One entry with its data; undefined where there is none of that id.
 * @param {string} id
 */
export async function get(id) {
  const { headers, contents } = await beginTransaction("readonly");
  const [header, data] = await Promise.all([requestResult(headers.get(id)), requestResult(contents.get(id))]);
  return header && { ...header, data };
}

/**
 * Note why an entry cannot be opened; its data stay as they are.
 * @param {string} id
 * @param {string} reason
 */
export async function markBroken(id, reason) {
  const { headers, completed } = await beginTransaction("readwrite");
  const header = await requestResult(headers.get(id));
  if (header) headers.put({ ...header, broken: reason });
  await completed;
}

/** @param {string} id */
export async function remove(id) {
  const { headers, contents, completed } = await beginTransaction("readwrite");
  headers.delete(id);
  contents.delete(id);
  await completed;
}

/** Delete all entries. */
export async function clear() {
  const { headers, contents, completed } = await beginTransaction("readwrite");
  headers.clear();
  contents.clear();
  await completed;
}

function newestFirst(entries) {
  return entries.sort((a, b) => (b.at || 0) - (a.at || 0));
}
