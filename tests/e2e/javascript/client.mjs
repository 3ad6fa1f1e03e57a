// What OpenAI's client makes of a server: prints one JSON object. Usage: node client.mjs BASE_URL MODEL
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "unused", maxRetries: 0 });
const asked = { model, prompt: "a house", size: "64x64", seed: 11, num_inference_steps: 12 };
const seen = {};

seen.models = [];
for await (const card of client.models.list()) seen.models.push(card.id);
seen.retrieved = (await client.models.retrieve(model)).id;

const plain = await client.images.generate({ ...asked, n: 1, output_format: "png" });
seen.plain = plain.data[0].b64_json;
seen.usage = plain.usage.total_tokens;

const linked = await client.images.generate({ ...asked, response_format: "url" });
const file = await fetch(linked.data[0].url);
seen.linked = Buffer.from(await file.arrayBuffer()).toString("base64");

seen.events = [];
for await (const event of await client.images.generate({ ...asked, stream: true, partial_images: 1 })) {
  seen.events.push(event.type);
  seen.streamed = event.b64_json;
}

const refused = await client.images.generate({ ...asked, n: 11 }).catch((error) => error);
seen.refused = [refused.constructor.name, refused.status, refused.param];
const missing = await client.images.generate({ ...asked, model: "gpt-image-1" }).catch((error) => error);
seen.missing = [missing.constructor.name, missing.status];

const stopped = new AbortController();
const left = client.images.generate({ ...asked, num_inference_steps: 200, size: "512x512" }, { signal: stopped.signal });
setTimeout(() => stopped.abort(), 300);
seen.left = (await left.catch((error) => error)).constructor.name;
console.log(JSON.stringify(seen));
