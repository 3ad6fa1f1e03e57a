// A person at the page, in headless Chromium: prints what was seen as JSON. Usage: node page.mjs URL SCREENSHOT [PROMPT SIDE]
import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";

const [url, screenshot, prompt = '<img src=x onerror="window.hurt=1">', side = 128] = process.argv.slice(2);
const browser = await puppeteer.launch({
  args: [...chromium.args, "--no-sandbox"],
  executablePath: await chromium.executablePath(),
  headless: "shell",
});
const page = await browser.newPage();
await page.setViewport({ width: 1100, height: 760 });
const seen = { problems: [], requested: [] };
page.on("console", (message) => message.type() === "error" && seen.problems.push(message.text()));
page.on("pageerror", (error) => seen.problems.push(String(error)));
page.on("request", (request) => seen.requested.push(new URL(request.url()).origin));
await page.goto(url);
seen.model = await page.$eval("#model", (element) => element.textContent);

const set = (values) =>
  page.evaluate((given) => {
    for (const [id, value] of Object.entries(given)) document.getElementById(id).value = value;
  }, values);
const draw = () => page.click("button.main");
const finished = (count) =>
  page.waitForFunction((n) => document.querySelectorAll(".card img:not(.preview)[src]").length >= n, { timeout: 60_000 }, count);

await set({ prompt, steps: 100, seed: 5, width: side, height: side, n: 1 });
await draw();
await page.waitForSelector("img.preview[src]", { timeout: 60_000 });
seen.previewed = await page.$eval("img.preview", (image) => image.src.slice(0, 22));
await finished(1);
seen.prompt = await page.$eval(".card span", (element) => element.textContent);
seen.hurt = await page.evaluate(() => window.hurt ?? 0);
seen.state = await page.$eval(".card span:nth-of-type(2)", (element) => element.textContent);

await set({ seed: "", prompt: "something else" });
await page.evaluate(() => [...document.querySelectorAll(".card button")].find((b) => b.textContent === "again").click());
seen.again = await page.evaluate(() => [document.getElementById("seed").value, document.getElementById("prompt").value]);

await set({ steps: 20, n: 3, seed: 20 });
await draw();
await finished(4);
await page.waitForFunction(() => document.querySelectorAll("canvas").length > 0, { timeout: 20_000 });
seen.lanes = await page.$$eval("#ranks div", (all) => all.map((element) => element.textContent));
await set({ steps: 200, n: 1, seed: 2 });
await draw();
await page.waitForSelector("img.preview[src]", { timeout: 60_000 });
await page.screenshot({ path: screenshot });
await finished(5);
await set({ steps: 200, n: 1, width: 256, height: 256 });
await draw();
await page.waitForFunction(() => document.querySelectorAll(".card").length === 6);
await page.evaluate(() => [...document.querySelectorAll(".card button")].find((b) => b.textContent === "cancel").click());
await page.waitForFunction(() => document.querySelectorAll(".card").length === 5, { timeout: 10_000 });

await set({ n: 11 });
await page.evaluate(() => { document.getElementById("n").max = ""; });
await draw();
await page.waitForFunction(() => document.getElementById("error").textContent, { timeout: 10_000 });
seen.error = await page.$eval("#error", (element) => element.textContent);
seen.requested = [...new Set(seen.requested)];
await browser.close();
console.log(JSON.stringify(seen));
