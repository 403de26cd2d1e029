// Scores and recommends from a bundle: JSON requests in, one on each line, JSON answers out.
//
//   npm ci --ignore-scripts      # in this folder; onnxruntime's own libraries are in the package
//   echo '{"user": "1", "items": ["1193", "661"], "scene": {"hour": 21}}' | node score.mjs bundle/
//   echo '{"user": "1", "scene": {"hour": 21}, "k": 5}' | node score.mjs bundle/
//
// A request with "items" is scored, one without is answered with recommendations. A user or an item
// is a key, or an object of raw features. Integers beyond 2^53 come as strings of digits. A mistake
// ends in one line and exit code 2; --verify compares every file's checksum first.

import readline from 'node:readline';
import { Bundle, BundleError } from './bundle.mjs';

const KNOWN = 'user items scene k candidates exclude allowed skip_seen'.split(' ');

async function answer(bundle, text) {
  let request;
  try {
    request = JSON.parse(text);
  } catch (error) {
    throw new BundleError(`no JSON request (${error.message})`);
  }
  for (const name of Object.keys(Object(request))) {
    if (!KNOWN.includes(name)) {
      throw new BundleError(`request field '${name}' does not exist; known: [${KNOWN.join(', ')}]`);
    }
  }
  const { user, items, scene, k, ...options } = Object(request);
  if (items) return { scores: Array.from(await bundle.score(user, items, scene)) };
  return { items: await bundle.recommend(user, scene, k, options) };
}

/** Let integer keys be numbers where JSON can hold them, digits where it cannot. */
function plain(_, value) {
  if (typeof value !== 'bigint') return value;
  return Number.isSafeInteger(Number(value)) ? Number(value) : `${value}`;
}

async function main(words) {
  const folders = words.filter((word) => word !== '--verify');
  if (folders.length !== 1) throw new BundleError('usage: node score.mjs BUNDLE [--verify] < JSON');
  const bundle = await Bundle.open(folders[0], { verify: words.length > 1 });
  let line = 0;
  for await (const text of readline.createInterface({ input: process.stdin })) {
    line += 1;
    if (!text.trim()) continue;
    try {
      console.log(JSON.stringify(await answer(bundle, text), plain));
    } catch (error) {
      if (error instanceof BundleError) error.message = `line ${line}: ${error.message}`;
      throw error;
    }
  }
}

try {
  await main(process.argv.slice(2));
} catch (error) {
  const [reason] = `${error.message}`.split('\n');
  console.error(`score.mjs: error: ${reason}`);
  process.exitCode = error instanceof BundleError ? 2 : 1;
}
