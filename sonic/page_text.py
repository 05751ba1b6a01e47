"""What the web page says, in English and Chinese. A key stands for one text; {names} in it are filled in by `say`."""

from __future__ import annotations

import gradio as gr
from gradio.i18n import I18nData

ENGLISH, CHINESE = "en", "zh-CN"  # gradio's own names for them
LANGUAGES = (("English", ENGLISH), ("中文", CHINESE))

TEXTS = {
    # what stands on the page
    "intro": (
        "# Sonic\nA portrait and a voice become a video in which the portrait speaks.",
        "# Sonic\n一张肖像加一段语音，生成会说话的肖像视频。",
    ),
    "language": ("Language", "语言"),
    "tab_one": ("One video", "单个视频"),
    "tab_batch": ("Batch", "批量"),
    "portrait": ("Portrait", "肖像"),
    "speech": ("Speech", "语音"),
    "face": ("Face", "人脸"),
    "face_mode": ("Where the face is", "人脸位置"),
    "face_auto": ("found by itself", "自动检测"),
    "face_hand": ("by hand", "手动框选"),
    "face_full": ("whole picture", "整张图片"),
    "face_help": (
        "Click two opposite corners of the face in the picture above, or move the sliders (per cent of the picture).",
        "在上图中点击人脸的两个对角，或拖动滑块（占图片的百分比）。",
    ),
    "left": ("Left", "左"),
    "top": ("Top", "上"),
    "right": ("Right", "右"),
    "bottom": ("Bottom", "下"),
    "motion": ("Motion", "动作幅度"),
    "mild": ("mild", "轻微"),
    "moderate": ("moderate", "适中"),
    "intense": ("intense", "强烈"),
    "more": ("More", "更多设置"),
    "seed": ("Seed", "随机种子"),
    "dice": ("⚄ New seed", "⚄ 换一个种子"),
    "translation": ("Head motion, 0 to 127", "头部运动，0 到 127"),
    "expression": ("Expression, 0 to 127", "表情，0 到 127"),
    "automatic": ("empty: automatic", "留空：自动"),
    "guidance_image": ("Image guidance", "图像引导"),
    "guidance_audio": ("Audio guidance", "音频引导"),
    "steps": ("Steps", "去噪步数"),
    "shift": ("Shift offset", "窗口偏移"),
    "resolution": ("Resolution (short side, pixels)", "分辨率（短边像素）"),
    "native": ("the model's own", "模型自身帧率"),
    "frame_rate": ("Frames per second", "每秒帧数"),
    "example": ("Try it with an example", "用示例试一试"),
    "animate": ("Animate", "生成视频"),
    "cancel": ("Cancel", "取消"),
    "video": ("Video", "视频"),
    "download_video": ("Download video", "下载视频"),
    "download_settings": ("Download settings", "下载设置"),
    "load_settings": ("Load settings (JSON or a video made here)", "载入设置（JSON 或本页生成的视频）"),
    "settings": ("The settings that made it", "生成所用的设置"),
    "compare": ("Compare with portrait and voice", "与肖像和语音对比"),
    "plot": ("How the mouth follows the voice", "口型与语音的同步情况"),
    "side_by_side": ("Beside the portrait", "与肖像并排"),
    "history": ("This session's videos", "本次会话的视频"),
    "portraits": ("Portraits", "肖像（可多选）"),
    "speeches": ("Voices", "语音（可多选）"),
    "batch_help": (
        "Every portrait speaks with every voice, with the settings of the first tab.",
        "每张肖像与每段语音逐一组合，使用第一个标签页的设置。",
    ),
    "make_all": ("Make all", "全部生成"),
    "zip": ("All videos (zip)", "全部视频（zip）"),
    # what it says while it works
    "idle": ("Your video will be here.", "视频将显示在这里。"),
    "waiting": ("Waiting for the job before", "等待前面的任务"),
    "reading": ("Reading the portrait and the speech", "读取肖像和语音"),
    "listening": ("Listening to the speech", "聆听语音"),
    "denoising": ("Denoising", "去噪"),
    "decoding": ("Drawing the frames", "绘制画面"),
    "writing": ("Writing the video", "写入视频"),
    "measuring": ("Measuring the video", "测量视频"),
    "step_of": ("step {done} of {total}", "第 {done} 步，共 {total} 步"),
    "left_over": ("{time} left", "还需 {time}"),
    "cancelled": ("Cancelled.", "已取消。"),
    "preview": ("How it looks by now", "当前画面预览"),
    "made": (
        "{frames} frames at {fps:g} fps: {seconds:.2f} s, {width} × {height}, seed {seed}, made in {time}",
        "{frames} 帧，{fps:g} 帧/秒：{seconds:.2f} 秒，{width} × {height}，种子 {seed}，用时 {time}",
    ),
    "seconds": ("{number:.0f} s", "{number:.0f} 秒"),
    "minutes": ("{number:.0f} min", "{number:.0f} 分钟"),
    "hours": ("{number:.1f} h", "{number:.1f} 小时"),
    "face_found": ("A face was found. The box can be moved: “by hand”.", "已检测到人脸。选择“手动框选”可以调整。"),
    "face_none": (
        "No face was found. Click two opposite corners of the face in the picture, or move the sliders.",
        "未检测到人脸。请在图片中点击人脸的两个对角，或拖动滑块。",
    ),
    "corner": ("Now click the opposite corner.", "请点击对角。"),
    "box_set": ("The box is drawn by hand.", "已手动框选。"),
    "box_full": ("The whole picture counts as the face.", "整张图片视为人脸。"),
    "speech_length": (
        "{seconds:.1f} s of speech: {frames} frames at {fps:g} per second.",
        "语音 {seconds:.1f} 秒：{frames} 帧，每秒 {fps:g} 帧。",
    ),
    "estimate": ("About {time} on this machine.", "在本机上大约需要 {time}。"),
    "no_estimate": (
        "How long that takes on this machine, the first video will tell.",
        "在本机上需要多久，生成第一个视频后即可知道。",
    ),
    "loaded": ("The settings were loaded.", "设置已载入。"),
    "state": ("State", "状态"),
    "state_waiting": ("waiting", "等待中"),
    "state_working": ("working, {percent:.0f} %", "进行中，{percent:.0f} %"),
    "state_done": ("done, {time}", "完成，用时 {time}"),
    "state_failed": ("failed: {why}", "失败：{why}"),
    "batch_cancelled": ("Cancelled. Videos that were ready are in the zip.", "已取消。已生成的视频在 zip 文件中。"),
    "batch_done": ("{made} of {total} videos made.", "共 {total} 个视频，已生成 {made} 个。"),
    # what it refuses; each is one sentence that says what to do
    "missing_portrait": ("The portrait is missing: choose a file.", "缺少肖像：请选择图片。"),
    "missing_speech": ("The speech is missing: choose a file.", "缺少语音：请选择音频。"),
    "missing_video": ("There is no video yet: make one first.", "还没有视频：请先生成一个。"),
    "gone": (
        "The file is gone, since files are kept for a while only: give it again.",
        "文件已被清理（只保留一段时间）：请重新上传。",
    ),
    "no_face": (
        "No face was found in the portrait: choose a picture that shows one face from the front, large and well lit, or "
        "say where it is.",
        "肖像中未检测到人脸：请换一张正面、清晰、光线充足的图片，或手动框选人脸。",
    ),
    "bad_picture": (
        "The portrait cannot be read as an image: give a whole PNG, JPEG or WebP file.",
        "无法读取肖像图片：请提供完整的 PNG、JPEG 或 WebP 文件。",
    ),
    "bad_sound": (
        "The speech holds no readable audio: give a WAV, MP3, FLAC or MP4.",
        "无法读取语音：请提供 WAV、MP3、FLAC 或 MP4 文件。",
    ),
    "heavy_portrait": (
        "Reading the portrait takes more time or memory than a file gets here: give a smaller picture.",
        "读取肖像所需的时间或内存超出限制：请换一张较小的图片。",
    ),
    "heavy_speech": (
        "Reading the speech takes more time or memory than a file gets here: give a shorter one, as mono or stereo.",
        "读取语音所需的时间或内存超出限制：请换一段较短的单声道或立体声音频。",
    ),
    "bad_settings": (
        "These are no settings: give a settings file or a video that was made here.",
        "无法识别设置：请提供设置文件或本页生成的视频。",
    ),
    "too_many": (
        "{count} videos are too many at once: {most} are taken here.",
        "一次 {count} 个视频太多：最多 {most} 个。",
    ),
    "too_long_to_compare": (
        "Only videos of up to {most:.0f} s are compared here.",
        "仅支持对比 {most:.0f} 秒以内的视频。",
    ),
    "incident": (
        "Something went wrong here, not with you: try again, or tell who runs this page the number {number}.",
        "服务器内部出错：请重试，或把编号 {number} 告诉本页的管理者。",
    ),
    "closed": ("The page was closed.", "页面已关闭。"),
}


def say(key: str, language: str = ENGLISH, **values) -> str:
    """A text in a language; one that is not known gets English."""
    return TEXTS[key][language == CHINESE].format(**values)


def duration(seconds: float, language: str = ENGLISH) -> str:
    """A time as people say it: 12 s, 4 min, 1.5 h."""
    if seconds < 90:
        return say("seconds", language, number=max(1, seconds))
    if seconds < 5400:
        return say("minutes", language, number=seconds / 60)
    return say("hours", language, number=seconds / 3600)


PREFIX = "sonic_"  # gradio has texts of its own, under names as simple


def translations() -> gr.I18n:
    """The same for what stands on the page, for gradio to show in the browser's language; see `label`."""
    english, chinese = ({PREFIX + key: pair[which] for key, pair in TEXTS.items()} for which in (0, 1))
    return gr.I18n(**{ENGLISH: english, CHINESE: chinese, "zh-TW": chinese})


def label(key: str) -> I18nData:
    """A text that the browser fills in."""
    return I18nData(PREFIX + key)
