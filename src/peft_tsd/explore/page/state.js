// What the page shows: the data in the file, the model and the weight chosen, and who follows the choice.

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const models = data.models;
const shown = { model: models[0], weight: null, scale: "linear" };

const decoded = new Map();

/** The float32 array number `index` of the file. */
function array(index) {
  if (!decoded.has(index)) {
    const bytes = Uint8Array.from(atob(data.arrays[index]), (letter) => letter.charCodeAt(0));
    // Read through a view: the file is little-endian whatever the machine is.
    const view = new DataView(bytes.buffer);
    decoded.set(index, Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true)));
  }
  return decoded.get(index);
}

/** The parts of the page that follow the chosen weight; each is told when another is chosen. */
const followers = [];

function choose(weight) {
  shown.weight = weight;
  for (const follow of followers) follow(weight);
}
