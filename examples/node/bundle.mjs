// Reads a hvdrec bundle (hvdrec/scoring/FORMAT.md) with Node's own modules and onnxruntime-node.
//
//   const bundle = await Bundle.open('bundle/');
//   await bundle.score('1', ['1193', '661'], { hour: 21, weekday: 4 });   // Float32Array
//   await bundle.recommend('1', { hour: 21 }, 20);                        // best first

import { createHash } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import ort from 'onnxruntime-node';

const FORMAT = 2;
const MISSING = { string: '', int: -(2n ** 63n), float: NaN };
const TENSOR = { string: 'string', int: 'int64', float: 'float64' };
const MANIFEST_BYTES = 16 * 2 ** 20;
const BLOCK_BYTES = 2 ** 24;

/** A mistake that whoever calls can mend; its message is one line. */
export class BundleError extends Error {}

export class Bundle {
  /** Open a bundle; with verify, compare every file's checksum with the manifest. */
  static async open(folder, options = {}) {
    try {
      return await Bundle.#opened(folder, options);
    } catch (error) {
      if (error instanceof BundleError) throw error;
      throw new BundleError(`${folder}: damaged bundle (${error.message.split('\n')[0]})`);
    }
  }

  static async #opened(folder, { verify = false, threads = 1 }) {
    const bundle = new Bundle();
    const { root, manifest } = readManifest(folder, verify);
    Object.assign(bundle, { root, manifest, meta: manifest.meta, arrays: {} });
    const { user_key, item_key, features } = manifest.meta.schema;
    bundle.key = { user: user_key, item: item_key };
    bundle.fields = { user: [], item: [], scene: [] };
    for (const field of features) bundle.fields[field.side].push(field);
    const options = {
      intraOpNumThreads: threads,
      interOpNumThreads: 1,
      executionMode: 'sequential',
      graphOptimizationLevel: 'all',
      executionProviders: ['cpu'],
    };
    const open = (name) => ort.InferenceSession.create(path.join(root, name), options);
    bundle.tower = {
      user: await open('user_tower.onnx'),
      item: await open('item_tower.onnx'),
    };
    bundle.ranker = await open('ranker.onnx');
    bundle.stored = { user: new Embeddings(bundle, 'user'), item: new Embeddings(bundle, 'item') };
    bundle.titles = bundle.holds('items/titles.npy') ? new Titles(bundle) : null;
    return bundle;
  }

  holds(name) {
    return Object.hasOwn(this.manifest.files, name);
  }

  array(name) {
    this.arrays[name] ??= new NpyFile(path.join(this.root, name));
    return this.arrays[name];
  }

  /** Return the probability of each item, Float32Array [n]; keys or objects of raw features. */
  async score(user, items, scene = {}) {
    if (!Array.isArray(items)) throw wrong('items', items, 'must be a list');
    const inputs = this.sceneInputs(scene);
    const users = await this.embed('user', [user]);
    if (!items.length) return new Float32Array(0);
    return this.rank(inputs, users, await this.embed('item', items), items.length);
  }

  /**
   * Return the k best items of the candidates: those with the largest inner product of embeddings,
   * over all items, that are not left out. Of a user of whom nothing is known: what is trending.
   *
   * exclude: keys; allowed: an item needs one of the values in each field, { genres: ['Drama'] };
   * skip_seen: leave out what the user met in the log.
   */
  async recommend(user, scene = {}, k = 10, options = {}) {
    const { candidates = 500, exclude = [], allowed = {}, skip_seen = false } = options;
    for (const [name, value] of Object.entries({ k, candidates })) {
      if (!Number.isInteger(value) || value < 1) {
        throw wrong(name, value, 'must be a whole number from 1');
      }
    }
    if (!Array.isArray(exclude)) throw wrong('exclude', exclude, 'must be a list');
    const inputs = this.sceneInputs(scene);
    const left = new Set(exclude.map((key) => this.stored.item.row(this.plainKey('item', key))));
    if (skip_seen) this.seen(user).forEach((row) => left.add(row));
    const kept = this.allowed(allowed);
    const users = await this.embed('user', [user]);
    if (!users.every(Number.isFinite)) throw wrong('user', user, 'its embedding is not finite');
    const source = this.source(user);
    const foundBy = source === 'trending' ? this.counts('trending') : this.retrieval(users);
    const stays = (row) => !left.has(row) && kept.every((some) => some.has(row));
    let rows = [...foundBy.keys()].filter(stays);
    if (source === 'trending') {
      const popularity = this.counts('popularity');
      rows.sort((a, b) => foundBy[b] - foundBy[a] || popularity[b] - popularity[a]);
      rows = rows.slice(0, k);
    } else {
      // Of equal ones the first rows are taken: the sort is stable.
      rows.sort((a, b) => foundBy[b] - foundBy[a]);
      rows = rows.slice(0, Math.max(k, candidates)).sort((a, b) => a - b);
    }
    if (!rows.length) return [];
    const scores = await this.rank(inputs, users, this.stored.item.take(rows), rows.length);
    const places = [...rows.keys()];
    if (source !== 'trending') places.sort((a, b) => scores[b] - scores[a]);
    return places.slice(0, k).map((place) => ({
      item: this.stored.item.key(rows[place]),
      score: scores[place],
      retrieval_score: foundBy[rows[place]],
      title: this.titles?.at(rows[place]) ?? null,
      source,
    }));
  }

  /** Return what is known of a user: "stored", "features", or nothing but what is "trending". */
  source(user) {
    const stored = (key) => this.stored.user.row(this.plainKey('user', key)) >= 0;
    if (!isObject(user)) return stored(user) ? 'stored' : 'trending';
    const tells = this.fields.user.filter(({ name }) => {
      const entries = Array.isArray(user[name]) ? user[name] : [user[name]];
      return entries.some((entry) => !isMissing(entry) && entry !== '');
    });
    const others = tells.filter(({ name }) => name !== this.key.user);
    if (others.length) return 'features';
    return tells.length && stored(user[this.key.user]) ? 'features' : 'trending';
  }

  /** Return embeddings [n * width] of keys (stored, or unknown to the tower) or raw features. */
  async embed(side, entries) {
    const width = this.meta[`${side}_width`];
    const out = new Float32Array(entries.length * width);
    const computed = [];
    entries.forEach((entry, place) => {
      if (isObject(entry)) {
        this.checkNames(side, entry, [this.key[side], ...this.fields[side].map((f) => f.name)]);
        computed.push([place, entry]);
        return;
      }
      const key = this.plainKey(side, entry);
      const row = this.stored[side].row(key);
      if (row < 0) computed.push([place, { [this.key[side]]: key }]);
      else out.set(this.stored[side].take([row]), place * width);
    });
    if (!computed.length) return out;
    const rows = computed.map(([, entry]) => entry);
    const inputs = {};
    for (const field of this.fields[side]) {
      inputs[field.name] = column(field, rows.map((row) => row[field.name]));
    }
    const output = this.tensor('embedding');
    const embedding = (await this.tower[side].run(inputs, [output]))[output];
    computed.forEach(([place], row) => {
      out.set(embedding.data.subarray(row * width, (row + 1) * width), place * width);
    });
    return out;
  }

  async rank(inputs, users, items, count) {
    const all = {
      ...inputs,
      [this.tensor('user_embedding')]: new ort.Tensor('float32', users, [1, this.meta.user_width]),
      [this.tensor('item_embedding')]: new ort.Tensor('float32', items, [count, this.meta.item_width]),
      [this.tensor('request')]: new ort.Tensor('int64', new BigInt64Array(count), [count]), // all of one request
    };
    const output = this.tensor('score');
    return (await this.ranker.run(all, [output]))[output].data;
  }

  /** Return the name of a tensor in the graphs: another one if a field has its usual name. */
  tensor(name) {
    return this.meta.names?.[name] ?? name;
  }

  /** Return what candidates are chosen by, one number for each item; more is better. */
  retrieval(user) {
    const width = this.meta.retrieval_width;
    if (!width) return this.counts('popularity');
    const stored = this.stored.item;
    const found = new Float32Array(stored.length);
    const block = Math.max(1, Math.floor(BLOCK_BYTES / (4 * stored.width)));
    for (let start = 0; start < found.length; start += block) {
      const count = Math.min(block, found.length - start);
      const vectors = stored.block(start, count);
      for (let row = 0; row < count; row++) {
        let sum = 0;
        for (let i = 0; i < width; i++) sum += vectors[row * stored.width + i] * user[i];
        found[start + row] = sum;
      }
    }
    return found;
  }

  /** Return the rows of the items that a user met in the log. */
  seen(user) {
    if (!this.holds('users/seen_offsets.npy')) {
      throw wrong('skip_seen', true, 'the bundle does not hold what users have seen');
    }
    const key = isObject(user) ? user[this.key.user] : user;
    const row = this.stored.user.row(this.plainKey('user', key));
    return row < 0 ? [] : this.list('users/seen_offsets.npy', 'users/seen_rows.npy', row);
  }

  /** Return, of each field that is asked for, the rows of the items with one of the values. */
  allowed(wanted) {
    if (!isObject(wanted)) throw wrong('allowed', wanted, 'must be an object of fields');
    const folder = (name) => `items/filters/${this.meta.filters?.[name] ?? name}`;
    const known = this.fields.item.filter(({ name }) => this.holds(`${folder(name)}/values.npy`));
    this.checkNames('allowed', wanted, known.map(({ name }) => name));
    return Object.entries(wanted).map(([name, values]) => {
      if (!Array.isArray(values)) throw wrong(`allowed.${name}`, values, 'must be a list');
      const field = known.find((one) => one.name === name);
      const all = new Keys(this.array(`${folder(name)}/values.npy`));
      const places = values.map((value) => all.row(scalar(field, value)));
      const lists = places
        .filter((place) => place >= 0)
        .map((place) => this.list(`${folder(name)}/offsets.npy`, `${folder(name)}/rows.npy`, place));
      return new Set(lists.flatMap((rows) => [...rows]));
    });
  }

  /** Return one of many lists of rows that stand one behind the other. */
  list(offsets, rows, place) {
    const [start, stop] = Array.from(this.array(offsets).numbers(place, 2), Number);
    return this.array(rows).numbers(start, stop - start);
  }

  /** Return how often each item was liked, of late ("trending") or at all ("popularity"). */
  counts(name) {
    const file = `items/${name}.npy`;
    if (name === 'trending' && !this.holds(file)) return this.counts('popularity');
    return Float64Array.from(this.array(file).numbers(), Number);
  }

  /** Return the scene's inputs [1]: what is left out takes its default, null is missing. */
  sceneInputs(scene) {
    if (!isObject(scene)) throw wrong('scene', scene, 'must be an object of fields');
    this.checkNames('scene', scene, this.fields.scene.map((field) => field.name));
    const inputs = {};
    for (const field of this.fields.scene) {
      const given = Object.hasOwn(scene, field.name) ? scene[field.name] : field.default;
      inputs[field.name] = column(field, [given]);
    }
    return inputs;
  }

  checkNames(what, given, known) {
    for (const name of Object.keys(given)) {
      if (!known.includes(name)) {
        throw new BundleError(`${what} field '${name}' does not exist; known: [${known.join(', ')}]`);
      }
    }
  }

  plainKey(side, key) {
    if (isMissing(key)) return null;
    const dtype = this.stored[side].text ? 'string' : 'int';
    return scalar({ name: this.key[side], dtype }, key);
  }
}

/** Values that ascend, each once: integers, or text in bytes of a fixed width. */
class Keys {
  constructor(array) {
    this.array = array;
    this.length = array.shape[0];
    this.text = array.descr.startsWith('|S');
  }

  key(row) {
    if (!this.text) return this.array.numbers(row, 1)[0];
    const bytes = this.array.bytes(row, 1);
    let end = bytes.length;
    while (end && !bytes[end - 1]) end--;
    return bytes.subarray(0, end).toString('utf8');
  }

  /** Return the row of a key, -1 where it is not stored: binary search. */
  row(key) {
    if (key === null) return -1;
    const wanted = this.text ? Buffer.from(key, 'utf8') : key;
    let low = 0;
    let high = this.length;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if (this.compare(middle, wanted) < 0) low = middle + 1;
      else high = middle;
    }
    return low < this.length && this.key(low) === key ? low : -1;
  }

  compare(row, wanted) {
    if (this.text) return Buffer.compare(Buffer.from(this.key(row), 'utf8'), wanted);
    const found = this.key(row);
    return found < wanted ? -1 : Number(found > wanted);
  }
}

/** Embeddings of one side with their keys: read from the files as they are asked for. */
class Embeddings extends Keys {
  constructor(bundle, side) {
    super(bundle.array(`${side}s/keys.npy`));
    this.vectors = bundle.array(`${side}s/embeddings.npy`);
    this.width = this.vectors.shape[1];
    const scaled = this.vectors.descr === '|i1';
    this.scales = scaled ? bundle.array(`${side}s/scales.npy`).numbers() : null;
    if (this.vectors.shape[0] !== this.length || this.width !== bundle.meta[`${side}_width`]) {
      throw new BundleError(`${bundle.root}/${side}s: keys and embeddings do not fit each other`);
    }
  }

  take(rows) {
    const out = new Float32Array(rows.length * this.width);
    rows.forEach((row, place) => out.set(this.block(row, 1), place * this.width));
    return out;
  }

  /** Return the vectors of consecutive rows as float32, whatever they are stored as. */
  block(start, count) {
    const stored = this.vectors.numbers(start, count);
    if (!this.scales) return stored;
    const scale = (value, i) => value * this.scales[start + Math.floor(i / this.width)];
    return Float32Array.from(stored, scale);
  }
}

class Titles {
  constructor(bundle) {
    this.blob = bundle.array('items/titles.npy');
    this.offsets = bundle.array('items/titles_offsets.npy');
  }

  at(row) {
    const [start, stop] = Array.from(this.offsets.numbers(row, 2), Number);
    return this.blob.bytes(start, stop - start).toString('utf8') || null;
  }
}

/** A .npy file of which parts are read; rows first, little-endian. */
class NpyFile {
  constructor(file) {
    this.file = file;
    this.handle = fs.openSync(file, 'r');
    const start = this.read(0, 12);
    if (start.subarray(0, 6).toString('latin1') !== '\x93NUMPY' || ![1, 2].includes(start[6])) {
      throw new BundleError(`${file}: no .npy file of version 1 or 2`);
    }
    const long = start[6] === 2;
    const length = long ? start.readUInt32LE(8) : start.readUInt16LE(8);
    const from = long ? 12 : 10;
    const header = this.read(from, length).toString('latin1');
    this.descr = /'descr': '([^']+)'/.exec(header)?.[1];
    this.shape = /'shape': \(([^)]*)\)/.exec(header)?.[1].split(',').filter(Boolean).map(Number);
    this.size = SIZES[this.descr] ?? Number(/^\|S(\d+)$/.exec(this.descr)?.[1]);
    if (!header.includes("'fortran_order': False") || Number.isNaN(this.size) || !this.shape) {
      throw new BundleError(`${file}: holds ${header.trim()}, which no bundle has`);
    }
    this.start = from + length;
    this.each = this.shape.slice(1).reduce((a, b) => a * b, 1);
    if (fs.fstatSync(this.handle).size < this.start + this.shape[0] * this.each * this.size) {
      throw new BundleError(`${file}: is shorter than its header says`);
    }
  }

  read(place, length) {
    const out = Buffer.alloc(length); // of its own: typed arrays begin at its first byte
    if (fs.readSync(this.handle, out, 0, length, place) !== length) {
      throw new BundleError(`${this.file}: is shorter than its header says`);
    }
    return out;
  }

  bytes(row, count) {
    const each = this.each * this.size;
    return this.read(this.start + row * each, count * each);
  }

  numbers(row = 0, count = this.shape[0]) {
    const { buffer } = this.bytes(row, count);
    if (this.descr === '<f2') return Float32Array.from(new Uint16Array(buffer), fromHalf);
    const kinds = { '<f4': Float32Array, '<i8': BigInt64Array, '<i4': Int32Array, '|i1': Int8Array };
    return new kinds[this.descr](buffer);
  }
}

const SIZES = { '<f4': 4, '<f2': 2, '<i8': 8, '<i4': 4, '|i1': 1, '|u1': 1 };

function fromHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0x1f) return fraction ? NaN : sign * Infinity;
  if (!exponent) return sign * fraction * 2 ** -24;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** Return a field's values as the tensor a graph takes: [N], or [N, L] for lists. */
function column(field, values) {
  const missing = MISSING[field.dtype];
  const newestLast = field.kind === 'sequence';
  if (!newestLast && field.kind !== 'categorical_list') {
    return tensor(field, values.map((value) => scalar(field, value)), [values.length]);
  }
  const length = Math.max(1, field.max_length);
  const lists = values.map((value) => {
    if (isMissing(value)) return [];
    if (!Array.isArray(value)) throw wrong(field.name, value, 'must be a list');
    const kept = newestLast ? value.slice(-length) : value.slice(0, length);
    return kept.map((entry) => scalar(field, entry));
  });
  const width = lists.reduce((widest, list) => Math.max(widest, list.length), 1);
  const flat = lists.flatMap((list) => {
    const padding = Array(width - list.length).fill(missing);
    return newestLast ? [...padding, ...list] : [...list, ...padding];
  });
  return tensor(field, flat, [values.length, width]);
}

function tensor(field, values, shape) {
  const arrays = { string: Array, int: BigInt64Array, float: Float64Array };
  return new ort.Tensor(TENSOR[field.dtype], arrays[field.dtype].from(values), shape);
}

/** Return one value in its field's type; null, undefined and NaN are missing. */
function scalar(field, value) {
  if (isMissing(value)) return MISSING[field.dtype];
  if (field.dtype === 'string') {
    if (typeof value === 'string' && value.isWellFormed?.() !== false) return value;
    throw wrong(field.name, value, 'must be a string');
  }
  if (field.dtype === 'float') {
    if (typeof value === 'number') return value;
    throw wrong(field.name, value, 'must be a number');
  }
  // JavaScript's numbers are exact to 2^53: larger integers come as BigInt or as digits.
  const digits = typeof value === 'string' && /^-?\d{1,19}$/.test(value);
  if (digits || Number.isSafeInteger(value) || typeof value === 'bigint') {
    const whole = BigInt(value);
    if (BigInt.asIntN(64, whole) === whole) return whole;
  }
  throw wrong(field.name, value, 'must be an integer');
}

function isMissing(value) {
  return value === null || value === undefined || Number.isNaN(value);
}

function isObject(value) {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function wrong(name, value, rule) {
  const shown = typeof value === 'bigint' ? `${value}` : JSON.stringify(value);
  return new BundleError(`${name} = ${shown}: ${rule}`);
}

/** Read the manifest and compare the files with it, none of which may lie outside. */
function readManifest(folder, verify) {
  let root;
  let text;
  try {
    root = fs.realpathSync(folder);
    const file = path.join(root, 'manifest.json');
    const { size } = regular(root, 'manifest.json');
    if (size > MANIFEST_BYTES) throw new BundleError(`${file}: is too large for a manifest`);
    text = fs.readFileSync(file, 'utf8');
  } catch (error) {
    if (error instanceof BundleError) throw error;
    throw new BundleError(`${folder}: no bundle here (manifest.json is missing)`);
  }
  let manifest;
  try {
    manifest = JSON.parse(text);
  } catch (error) {
    throw new BundleError(`${root}/manifest.json: damaged manifest (${error.message})`);
  }
  if (manifest?.kind !== 'bundle' || manifest.format !== FORMAT) {
    throw new BundleError(
      `${root}: is ${manifest?.kind} of format ${manifest?.format}, this reads bundle of ${FORMAT}`,
    );
  }
  for (const [name, { bytes, sha256 }] of Object.entries(manifest.files)) {
    const file = path.join(root, name);
    if (regular(root, name).size !== bytes) throw new BundleError(`${file}: has another size`);
    if (verify && digest(file) !== sha256) throw new BundleError(`${file}: contents differ`);
  }
  return { root, manifest };
}

function regular(root, name) {
  const file = path.join(root, name);
  const status = fs.statSync(file, { throwIfNoEntry: false });
  if (!status?.isFile()) throw new BundleError(`${file}: is missing`);
  if (!fs.realpathSync(file).startsWith(root + path.sep)) {
    throw new BundleError(`${root}: file name '${name}' leaves the bundle; do not use this bundle`);
  }
  return status;
}

function digest(file) {
  const hash = createHash('sha256');
  const handle = fs.openSync(file, 'r');
  const block = Buffer.alloc(2 ** 20);
  for (let read; (read = fs.readSync(handle, block)) > 0; ) hash.update(block.subarray(0, read));
  fs.closeSync(handle);
  return hash.digest('hex');
}
